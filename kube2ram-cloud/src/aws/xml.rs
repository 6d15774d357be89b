//! The XML of STS: elements and text, and nothing else. Pure and total: any bytes in, leaves or `None` out.
//!
//! It takes no document type, comment, CDATA section, processing instruction or prefixed name, so that there
//! is nothing to expand and nothing to fetch. STS writes none of them (STS API 2011-06-15). Called by `wire`,
//! which bounds the length.

/// An element without elements in it. It has no `Debug`, as the text may be a secret.
pub(super) struct Leaf<'a> {
    /// The names from the root to it, joined by `/`.
    path: String,
    /// As it stands, without the white space around it.
    raw: &'a str,
}

/// A document's leaves, in their order.
pub(super) struct Leaves<'a>(Vec<Leaf<'a>>);

impl<'a> Leaves<'a> {
    /// Reads a document; `None` when it holds anything that STS would not write.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let mut rest = skip_declaration(text.trim_ascii_start())?;
        let mut leaves = Vec::new();
        // The open elements, and whether each has an element in it.
        let mut open: Vec<(&str, bool)> = Vec::new();
        loop {
            let (before, tag) = rest.split_once('<')?;
            let (tag, after) = tag.split_once('>')?;
            rest = after;
            let raw = before.trim_ascii();
            if let Some(name) = tag.strip_prefix('/') {
                let (opened, has_elements) = open.pop()?;
                if name.trim_ascii_end() != opened || (has_elements && !raw.is_empty()) {
                    return None;
                }
                if !has_elements {
                    push(&mut leaves, &open, opened, raw)?;
                }
            } else {
                // Text is in leaves only.
                if !raw.is_empty() || open.len() == MAX_DEPTH {
                    return None;
                }
                if let Some((_, has_elements)) = open.last_mut() {
                    *has_elements = true;
                }
                let (tag, is_empty) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
                let name = element_name(tag)?;
                if is_empty {
                    push(&mut leaves, &open, name, "")?;
                } else {
                    open.push((name, false));
                }
            }
            if open.is_empty() {
                return rest.trim_ascii().is_empty().then_some(Self(leaves));
            }
        }
    }

    /// Whether there is a leaf at this path.
    pub(super) fn has(&self, path: &str) -> bool {
        self.0.iter().any(|leaf| leaf.path == path)
    }

    /// The text at this path as it stands; `None` when it is not there, or twice.
    pub(super) fn raw(&self, path: &str) -> Option<&'a str> {
        let mut found = self.0.iter().filter(|leaf| leaf.path == path);
        let leaf = found.next()?;
        found.next().is_none().then_some(leaf.raw)
    }

    /// The text at this path, its references replaced.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        unescape(self.raw(path)?)
    }
}

fn push<'a>(leaves: &mut Vec<Leaf<'a>>, open: &[(&str, bool)], name: &str, raw: &'a str) -> Option<()> {
    if leaves.len() == MAX_LEAVES {
        return None;
    }
    let names: Vec<&str> = open.iter().map(|(name, _)| *name).chain([name]).collect();
    leaves.push(Leaf { path: names.join("/"), raw });
    Some(())
}

/// `<?xml version="1.0" encoding="UTF-8"?>` may come first.
fn skip_declaration(text: &str) -> Option<&str> {
    match text.strip_prefix("<?xml ") {
        None => Some(text),
        Some(declaration) => {
            let (inside, rest) = declaration.split_once("?>")?;
            are_attributes(inside).then_some(rest)
        }
    }
}

/// A tag's name, when its attributes are well formed. They say nothing: STS has the namespace there.
fn element_name(tag: &str) -> Option<&str> {
    let end = tag.find(|c: char| c.is_ascii_whitespace()).unwrap_or(tag.len());
    let (name, attributes) = tag.split_at(end);
    (is_name(name) && are_attributes(attributes)).then_some(name)
}

fn are_attributes(text: &str) -> bool {
    let mut rest = text.trim_ascii();
    while !rest.is_empty() {
        let Some((name, after)) = rest.split_once('=') else { return false };
        let Some(quote @ ('"' | '\'')) = after.chars().next() else { return false };
        let Some((value, after)) = after[1..].split_once(quote) else { return false };
        // A `>` in it would already have ended the tag.
        let is_apart = after.is_empty() || after.starts_with(|c: char| c.is_ascii_whitespace());
        if !is_name(name) || value.contains('<') || !is_apart {
            return false;
        }
        rest = after.trim_ascii_start();
    }
    true
}

/// No prefix, and no more of XML's letters than STS uses.
fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-' | b'.'))
}

/// The five references of XML, and those to a character. Any other needs a document type.
fn unescape(raw: &str) -> Option<String> {
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((before, after)) = rest.split_once('&') {
        let (reference, after) = after.split_once(';')?;
        text.push_str(before);
        text.push(match reference {
            "amp" => '&',
            "apos" => '\'',
            "gt" => '>',
            "lt" => '<',
            "quot" => '"',
            _ => character(reference.strip_prefix('#')?)?,
        });
        rest = after;
    }
    text.push_str(rest);
    Some(text)
}

fn character(number: &str) -> Option<char> {
    let (digits, radix) = number.strip_prefix('x').map_or((number, 10), |digits| (digits, 16));
    // `from_str_radix` takes a sign.
    let fits = (1..=8).contains(&digits.len()) && digits.bytes().all(|c| c.is_ascii_hexdigit());
    let value = fits.then(|| u32::from_str_radix(digits, radix).ok()).flatten()?;
    char::from_u32(value).filter(|&c| c != '\0')
}

/// The deepest element of STS's answers is the fourth.
const MAX_DEPTH: usize = 8;
/// STS's longest answer has 15.
const MAX_LEAVES: usize = 64;
const MAX_NAME_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaves(text: &str) -> Option<Vec<(String, String)>> {
        Some(Leaves::parse(text)?.0.into_iter().map(|leaf| (leaf.path, leaf.raw.to_owned())).collect())
    }

    #[test]
    fn reads_leaves_with_their_paths() {
        let text = "\n<?xml version=\"1.0\" encoding='UTF-8'?>\n<A xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\n \
                    <B>\n  <C> one </C>\n  <D/>\n  <E ></E >\n </B>\n <F>a &amp; b</F></A>\n";

        let expected = [("A/B/C", "one"), ("A/B/D", ""), ("A/B/E", ""), ("A/F", "a &amp; b")];
        assert_eq!(leaves(text).unwrap(), expected.map(|(path, raw)| (path.to_owned(), raw.to_owned())));
        let leaves = Leaves::parse(text).unwrap();
        assert_eq!((leaves.raw("A/B/C"), leaves.text("A/F").as_deref()), (Some("one"), Some("a & b")));
        assert_eq!((leaves.raw("A/B"), leaves.raw("A/G"), leaves.raw("F")), (None, None, None));
    }

    #[test]
    fn refuses_all_that_sts_does_not_write() {
        assert!(leaves("<A><B>x</B></A>").is_some());
        for text in [
            "",
            "x",
            "<A>",
            "</A>",
            "<A></B>",
            "<A><B></A></B>",
            "<A>x<B>y</B></A>",
            "<A><B>y</B>x</A>",
            "<A>x</A><B/>",
            "<A>x</A>y",
            "<A>x</A",
            "y<A>x</A>",
            "<!DOCTYPE A [<!ENTITY e SYSTEM \"file:///etc/passwd\">]><A>&e;</A>",
            "<A><!-- x --><B>y</B></A>",
            "<A><![CDATA[x]]></A>",
            "<A><?php x?></A>",
            "<?xml version=\"1.0\"?><?xml version=\"1.0\"?><A/>",
            "<?xml version=1.0?><A/>",
            "<s:A>x</s:A>",
            "<A b>x</A>",
            "<A b=c>x</A>",
            "<A b=\"c\"d=\"e\">x</A>",
            "<A b=\"<\">x</A>",
            "< A>x</A>",
            "<1>x</1>",
            "<é>x</é>",
            "<A//>",
            "<>x</>",
        ] {
            assert_eq!(leaves(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_there_twice_is_not_read() {
        let text = "<A><B>one</B><B>two</B><C>three</C></A>";

        let leaves = Leaves::parse(text).unwrap();

        assert_eq!((leaves.raw("A/B"), leaves.raw("A/C")), (None, Some("three")));
    }

    #[test]
    fn replaces_references_of_xml_and_no_others() {
        for (raw, text) in [
            ("a&lt;b&gt;c&amp;d&apos;e&quot;f", Some("a<b>c&d'e\"f")),
            ("&#65;&#x42;&#x1F600;", Some("AB😀")),
            ("&amp;lt;", Some("&lt;")),
            ("&e;", None),
            ("&amp", None),
            ("&;", None),
            ("&#;", None),
            ("&#0;", None),
            ("&#-1;", None),
            ("&#+65;", None),
            ("&#xD800;", None),
            ("&#x110000;", None),
            ("&#999999999;", None),
        ] {
            assert_eq!(unescape(raw).as_deref(), text, "{raw}");
        }
    }

    #[test]
    fn depth_width_and_names_are_bounded() {
        let nested = |depth: usize| format!("{}x{}", "<A>".repeat(depth), "</A>".repeat(depth));
        let wide = |count: usize| format!("<A>{}</A>", "<B/>".repeat(count));
        let named = |length: usize| format!("<{0}/>", "n".repeat(length));

        assert!(leaves(&nested(MAX_DEPTH)).is_some() && leaves(&nested(MAX_DEPTH + 1)).is_none());
        assert!(leaves(&wide(MAX_LEAVES)).is_some() && leaves(&wide(MAX_LEAVES + 1)).is_none());
        assert!(leaves(&named(MAX_NAME_BYTES)).is_some() && leaves(&named(MAX_NAME_BYTES + 1)).is_none());
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>(), marks in "[<>/&;#!?=\"' A-Ca-c\\[\\]-]{0,80}") {
            for text in [&text, &marks] {
                drop(leaves(text));
                drop(unescape(text));
            }
        }

        #[test]
        fn a_document_reads_back_as_it_was_written(values in proptest::collection::vec("[ -~]{0,20}", 1..8)) {
            let escape = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            let elements: String = values.iter().enumerate()
                .map(|(number, value)| format!("<V{number}>{}</V{number}>", escape(value))).collect();
            let document = format!("<A>{elements}</A>");

            let leaves = Leaves::parse(&document).unwrap();

            for (number, value) in values.iter().enumerate() {
                prop_assert_eq!(leaves.text(&format!("A/V{number}")).unwrap(), value.trim());
            }
        }
    }
}
