//! Keys of maps in upper or lower case: ack-ram-authenticator's libraries take `rolearn`, `roleARN` and
//! `RoleArn` for the same. Pure; used by `sections` and `config`.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, EnumAccess, IntoDeserializer as _, MapAccess, SeqAccess, Visitor},
};

/// A value whose keys were put in lower case before they were read, at any depth. The fields of `T` must have
/// names in lower case.
#[derive(Debug, Default)]
pub(crate) struct AnyCase<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for AnyCase<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(LowerKeys(deserializer)).map(Self)
    }
}

/// Any of serde's parts, with keys in lower case in all that comes through it.
struct LowerKeys<T>(T);

macro_rules! forward_deserialize {
    ($($method:ident($($name:ident: $type:ty),*);)*) => {$(
        fn $method<V: Visitor<'de>>(self, $($name: $type,)* visitor: V) -> Result<V::Value, Self::Error> {
            self.0.$method($($name,)* LowerKeys(visitor))
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for LowerKeys<D> {
    type Error = D::Error;

    forward_deserialize! {
        deserialize_any();
        deserialize_bool();
        deserialize_i8();
        deserialize_i16();
        deserialize_i32();
        deserialize_i64();
        deserialize_i128();
        deserialize_u8();
        deserialize_u16();
        deserialize_u32();
        deserialize_u64();
        deserialize_u128();
        deserialize_f32();
        deserialize_f64();
        deserialize_char();
        deserialize_str();
        deserialize_string();
        deserialize_bytes();
        deserialize_byte_buf();
        deserialize_option();
        deserialize_unit();
        deserialize_unit_struct(name: &'static str);
        deserialize_newtype_struct(name: &'static str);
        deserialize_seq();
        deserialize_tuple(len: usize);
        deserialize_tuple_struct(name: &'static str, len: usize);
        deserialize_map();
        deserialize_struct(name: &'static str, fields: &'static [&'static str]);
        deserialize_enum(name: &'static str, variants: &'static [&'static str]);
        deserialize_identifier();
        deserialize_ignored_any();
    }

    fn is_human_readable(&self) -> bool {
        self.0.is_human_readable()
    }
}

macro_rules! forward_visit {
    ($($method:ident($type:ty);)*) => {$(
        fn $method<E: serde::de::Error>(self, value: $type) -> Result<Self::Value, E> {
            self.0.$method(value)
        }
    )*};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for LowerKeys<V> {
    type Value = V::Value;

    forward_visit! {
        visit_bool(bool);
        visit_i8(i8);
        visit_i16(i16);
        visit_i32(i32);
        visit_i64(i64);
        visit_i128(i128);
        visit_u8(u8);
        visit_u16(u16);
        visit_u32(u32);
        visit_u64(u64);
        visit_u128(u128);
        visit_f32(f32);
        visit_f64(f64);
        visit_char(char);
        visit_str(&str);
        visit_borrowed_str(&'de str);
        visit_string(String);
        visit_bytes(&[u8]);
        visit_borrowed_bytes(&'de [u8]);
        visit_byte_buf(Vec<u8>);
    }

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(formatter)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        self.0.visit_none()
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        self.0.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        self.0.visit_some(LowerKeys(deserializer))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        self.0.visit_newtype_struct(LowerKeys(deserializer))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
        self.0.visit_seq(LowerKeys(seq))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        self.0.visit_map(LowerKeys(map))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<Self::Value, A::Error> {
        self.0.visit_enum(data)
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for LowerKeys<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(LowerKeys(deserializer))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for LowerKeys<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        self.0.next_element_seed(LowerKeys(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for LowerKeys<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        let Some(key) = self.0.next_key::<String>()? else { return Ok(None) };
        seed.deserialize(key.to_ascii_lowercase().into_deserializer()).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.0.next_value_seed(LowerKeys(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::de::IgnoredAny;

    use super::*;

    #[derive(Debug, Default, Deserialize, PartialEq)]
    struct Outer {
        #[serde(default)]
        list: Option<Vec<Inner>>,
        #[serde(rename = "aport", default)]
        port: Option<u16>,
        #[serde(default)]
        yes: bool,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    struct Inner {
        name: String,
        #[serde(flatten)]
        rest: BTreeMap<String, IgnoredAny>,
    }

    fn yaml(text: &str) -> Result<Outer, String> {
        serde_saphyr::from_str::<AnyCase<Outer>>(text).map(|read| read.0).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_are_read_in_any_case_and_values_as_they_are() {
        let read = yaml("LiSt:\n- NAME: Alice\n  eXtra: 1\n- name: 0012\naPort: 443\nYes: true\n").unwrap();

        let list = read.list.unwrap();
        assert_eq!((&*list[0].name, &*list[1].name), ("Alice", "0012"));
        assert_eq!(list[0].rest.keys().collect::<Vec<_>>(), ["extra"]);
        assert_eq!((read.port, read.yes), (Some(443), true));
        let json = r#"{"LIST": [{"Name": "A"}], "yes": true}"#;
        assert_eq!(serde_json::from_str::<AnyCase<Outer>>(json).unwrap().0.list.unwrap()[0].name, "A");
        assert_eq!(yaml("list:\n").unwrap(), Outer::default());
    }

    #[test]
    fn a_key_that_is_there_twice_in_two_cases_is_refused() {
        assert!(yaml("yes: true\nYES: false\n").unwrap_err().contains("duplicate field"));
        assert!(serde_json::from_str::<AnyCase<Outer>>(r#"{"yes": true, "yEs": true}"#).is_err());
    }
}
