//! What is kept of a list, a watch or an object, event by event. Called by the parent.

use std::{borrow::Cow, io, mem};

use jiff::Timestamp;
use json_event_parser::{JsonEvent, LowLevelJsonSerializer};

use super::{Keys, Shape};
use crate::kubernetes::object::CUT;

/// What a text becomes that is not read to its end. Whoever writes the same is treated alike.
pub(super) const TOO_LONG: &str = "\u{fffd}the text is too long";
/// More than anything that is used is nested, and less than serde_json reads.
const DEPTH_LIMIT: usize = 64;
/// The longest text of a field: names, phases, addresses and times are shorter.
const FIELD_LIMIT_BYTES: usize = 1024;

/// What is passed over at present.
#[derive(Clone, Copy)]
enum Skip {
    Nothing,
    /// The value that comes next.
    Next,
    /// Everything, until so many objects and arrays have ended.
    Within(usize),
}

pub(super) struct Sieve {
    pub(super) shape: Shape,
    keys: Keys,
    /// Of each open object the present key; `None` for an array.
    path: Vec<Option<Box<str>>>,
    skip: Skip,
    item: Item,
    writer: LowLevelJsonSerializer,
    pub(super) output: Vec<u8>,
}

/// What the present object has had so far.
#[derive(Debug, Default)]
struct Item {
    has_metadata: bool,
    has_spec: bool,
    has_status: bool,
    /// Whether it had another value where only an object can be. Its `spec` becomes one that cannot be read,
    /// so that it counts as malformed and not as an object without annotations.
    is_malformed: bool,
}

/// How a value is kept.
enum Kept {
    No,
    AsItIs,
    /// So many bytes of a string. Any other value becomes an empty string, which is no valid value.
    Annotation(usize),
    /// A string, number, boolean or null. Anything else, and a long string, becomes an empty array, which is
    /// no valid value.
    Field,
    /// An object of the list or watch. Any other value becomes one that cannot be read.
    Item,
    /// An object. Any other value becomes an empty one, and makes the item malformed, unless it is null.
    Object,
    /// As it is, but an array becomes an empty one.
    Part,
    /// A string. Any other value, and a long string, becomes null.
    Text,
    /// A time. Any other value becomes null.
    Time,
}

impl Sieve {
    pub(super) fn new(shape: Shape, keys: Keys) -> Self {
        Self {
            shape,
            keys,
            path: Vec::new(),
            skip: Skip::Nothing,
            item: Item::default(),
            writer: LowLevelJsonSerializer::new(),
            output: Vec::new(),
        }
    }

    pub(super) fn start_next(&mut self) {
        self.path.clear();
        self.skip = Skip::Nothing;
        self.writer = LowLevelJsonSerializer::new();
        self.output.push(b'\n');
    }

    pub(super) fn take(&mut self, event: JsonEvent<'_>) -> io::Result<()> {
        use JsonEvent::{EndArray, EndObject, ObjectKey, StartArray, StartObject};
        let (is_start, is_end) =
            (matches!(event, StartArray | StartObject), matches!(event, EndArray | EndObject));
        match self.skip {
            Skip::Within(depth) => {
                let depth = depth + usize::from(is_start) - usize::from(is_end);
                self.skip = if depth == 0 { Skip::Nothing } else { Skip::Within(depth) };
                return Ok(());
            }
            Skip::Next => {
                self.skip = if is_start { Skip::Within(1) } else { Skip::Nothing };
                return Ok(());
            }
            Skip::Nothing => {}
        }
        match event {
            ObjectKey(key) => {
                if let Some(last) = self.path.last_mut() {
                    *last = Some((*key).into());
                }
                if matches!(self.kept(), Kept::No) || self.is_repeated(&key) {
                    self.skip = Skip::Next;
                    return Ok(());
                }
                self.write(ObjectKey(key))
            }
            EndArray | EndObject => {
                self.path.pop();
                if self.is_at_item() {
                    self.complete_item()?;
                }
                self.write(event)
            }
            event => self.take_value(event),
        }
    }

    fn take_value(&mut self, event: JsonEvent<'_>) -> io::Result<()> {
        use JsonEvent::{Null, StartArray, StartObject, String};
        let is_start = matches!(event, StartArray | StartObject);
        if is_start && self.path.len() >= DEPTH_LIMIT {
            return self.replace(true, &[Null]);
        }
        let kept = self.kept();
        match (kept, event) {
            (Kept::Annotation(limit), String(text)) => self.write(String(cut(text, limit))),
            (Kept::Annotation(_), _) => self.replace(is_start, &[String("".into())]),
            (Kept::Field | Kept::Text, String(text)) if is_field(&text) => self.write(String(text)),
            (Kept::Time, String(text)) if is_field(&text) && text.parse::<Timestamp>().is_ok() => {
                self.write(String(text))
            }
            (Kept::Text | Kept::Time, _) => self.replace(is_start, &[Null]),
            (Kept::Field, StartArray | StartObject | String(_)) => self.empty_array(is_start),
            (Kept::Part, StartArray) => self.empty_array(true),
            (Kept::Item, StartObject) => {
                self.item = Item::default();
                self.open(StartObject)
            }
            (Kept::Item, _) => {
                self.item = Item { is_malformed: true, ..Item::default() };
                self.write(StartObject)?;
                self.complete_item()?;
                self.replace(is_start, &[JsonEvent::EndObject])
            }
            (Kept::Object, event) if !matches!(event, StartObject) => {
                self.item.is_malformed |= !matches!(event, Null);
                self.replace(is_start, &[StartObject, JsonEvent::EndObject])
            }
            (_, event) if is_start => self.open(event),
            (_, event) => self.write(event),
        }
    }

    /// Writes `instead` of the value that begins.
    fn replace(&mut self, is_start: bool, instead: &[JsonEvent<'static>]) -> io::Result<()> {
        if is_start {
            self.skip = Skip::Within(1);
        }
        instead.iter().try_for_each(|event| self.write(event.clone()))
    }

    fn empty_array(&mut self, is_start: bool) -> io::Result<()> {
        self.replace(is_start, &[JsonEvent::StartArray, JsonEvent::EndArray])
    }

    fn open(&mut self, event: JsonEvent<'_>) -> io::Result<()> {
        self.path.push(None);
        self.write(event)
    }

    fn write(&mut self, event: JsonEvent<'_>) -> io::Result<()> {
        self.writer.serialize_event(event, &mut self.output)
    }

    /// Whether the value at the present path is an object of the list or watch.
    fn is_at_item(&self) -> bool {
        match (self.shape, &self.path[..]) {
            (Shape::List, [Some(key), None]) => **key == *"items",
            (Shape::Watch, [Some(key)]) => **key == *"object",
            _ => false,
        }
    }

    /// Notes a key of an item. Returns whether the item has had it already: serde refuses that.
    fn is_repeated(&mut self, key: &str) -> bool {
        let depth = match self.shape {
            Shape::List => 3,
            Shape::Watch => 2,
            Shape::Object => return false,
        };
        if self.path.len() != depth {
            return false;
        }
        match key {
            "metadata" => mem::replace(&mut self.item.has_metadata, true),
            // It is written at the end.
            "spec" if self.item.is_malformed => true,
            "spec" => mem::replace(&mut self.item.has_spec, true),
            "status" => mem::replace(&mut self.item.has_status, true),
            _ => false,
        }
    }

    /// Adds what an object cannot be read without. Its `spec` is then none, so that it counts as malformed.
    fn complete_item(&mut self) -> io::Result<()> {
        let item = mem::take(&mut self.item);
        if !item.has_metadata {
            self.write(JsonEvent::ObjectKey("metadata".into()))?;
            self.replace(false, &[JsonEvent::StartObject, JsonEvent::EndObject])?;
        }
        let missing = match item {
            Item { has_spec: false, .. } => "spec",
            Item { is_malformed: true, has_status: false, .. } => "status",
            _ => return Ok(()),
        };
        self.write(JsonEvent::ObjectKey(missing.into()))?;
        self.empty_array(false)
    }

    /// How the value at the present path is kept.
    fn kept(&self) -> Kept {
        if self.is_at_item() {
            return Kept::Item;
        }
        let path: Vec<&str> = self.path.iter().filter_map(Option::as_deref).collect();
        match (self.shape, &path[..]) {
            (Shape::Object, ["metadata", "annotations", key]) => self.annotation(key),
            (Shape::Object, [] | ["metadata"] | ["metadata", "annotations"]) => Kept::AsItIs,
            (Shape::Object, _) => Kept::No,
            (Shape::List, ["items", path @ ..]) => self.kept_of_item(path),
            (Shape::Watch, ["object", path @ ..]) => match path {
                // Of a bookmark; and of an error, which is a `Status`.
                ["apiVersion" | "kind" | "message" | "reason"] => Kept::Text,
                ["code"] => Kept::AsItIs,
                _ => self.kept_of_item(path),
            },
            _ => Kept::AsItIs,
        }
    }

    fn kept_of_item(&self, path: &[&str]) -> Kept {
        match path {
            ["metadata", "annotations", key] => self.annotation(key),
            ["metadata"] | ["metadata", "annotations"] => Kept::Object,
            ["metadata", "creationTimestamp" | "deletionTimestamp"] => Kept::Time,
            ["metadata", "name" | "namespace" | "resourceVersion" | "uid"] => Kept::Text,
            ["spec" | "status"] => Kept::Part,
            ["spec", "hostNetwork" | "nodeName" | "serviceAccountName"] => Kept::Field,
            ["status", "phase" | "podIP"] => Kept::Field,
            []
            | ["status", "containerStatuses"]
            | ["status", "containerStatuses", "state"]
            | ["status", "containerStatuses", "state", "running"] => Kept::AsItIs,
            _ => Kept::No,
        }
    }

    fn annotation(&self, key: &str) -> Kept {
        let limits = self.keys.iter().filter(|(name, _)| **name == *key).map(|(_, limit)| *limit);
        limits.max().map_or(Kept::No, Kept::Annotation)
    }
}

fn is_field(text: &str) -> bool {
    text.len() <= FIELD_LIMIT_BYTES
}

/// A value that is too long is as long as before the limit for whoever reads it, and ends in a mark that no
/// valid value has. So does one with a control character, which takes six bytes of JSON: no valid value has
/// one either.
fn cut(text: Cow<'_, str>, limit_bytes: usize) -> Cow<'_, str> {
    if text == TOO_LONG {
        return CUT.to_string().repeat(limit_bytes / CUT.len_utf8() + 1).into();
    }
    let is_control = |c: char| c < ' ' && !matches!(c, '\t' | '\n' | '\r');
    let end = text.find(is_control).unwrap_or(text.len()).min(text.floor_char_boundary(limit_bytes));
    if end == text.len() {
        return text;
    }
    format!("{}{CUT}", &text[..end]).into()
}
