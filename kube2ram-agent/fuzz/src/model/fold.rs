//! Ways in which servers, file systems and the libraries below them make two texts equal. Lenient: what is
//! malformed stays.

/// `%2f`, and IIS's `%u002f`.
pub(super) fn percent_decoded(bytes: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&byte, after)) = rest.split_first() {
        let wide = after.strip_prefix(b"u").or(after.strip_prefix(b"U")).and_then(|digits| hex(digits, 4));
        let (bytes, length) = match (byte, wide.and_then(char::from_u32), hex(after, 2)) {
            (b'%', Some(c), _) => (c.to_string().into_bytes(), 6),
            (b'%', None, Some(code)) => (vec![code.to_le_bytes()[0]], 3),
            _ => (vec![byte], 1),
        };
        decoded.extend(bytes);
        rest = &rest[length..];
    }
    decoded
}

pub(super) fn starts_with_escape(text: &str) -> bool {
    text.as_bytes().strip_prefix(b"%").is_some_and(|digits| hex(digits, 2).is_some())
}

fn hex(digits: &[u8], count: usize) -> Option<u32> {
    let digits = digits.get(..count).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))?;
    u32::from_str_radix(str::from_utf8(digits).ok()?, 16).ok()
}

/// Forms' blanks.
pub(super) fn plus_decoded(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect()
}

/// ASCII in two, three or four bytes, as careless UTF-8 decoders take it: `c0 af` is a slash.
pub(super) fn overlong_decoded(bytes: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, after)) = rest.split_first() {
        let length = match first {
            0xc0 | 0xc1 => 2,
            0xe0 => 3,
            0xf0 => 4,
            _ => 1,
        };
        let tail = after.get(..length - 1).unwrap_or_default();
        let bits = |byte: u8| u32::from(byte & 0x3f);
        let code = tail.iter().fold(u32::from(first & 1), |code, byte| code << 6 | bits(*byte));
        if length > 1 && tail.len() == length - 1 && code < 0x80 {
            decoded.push(code.to_le_bytes()[0]);
            rest = &after[length - 1..];
        } else {
            decoded.push(first);
            rest = after;
        }
    }
    decoded
}

/// What a seven-bit server sees.
pub(super) fn without_eighth_bit(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| byte & 0x7f).collect()
}

/// Lower case, look-alikes as what they look like, no blanks or invisible characters inside; backslashes are
/// slashes.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(ascii)
        .flat_map(char::to_lowercase)
        .map(ascii)
        // A NUL ends a name in C; the others are dropped by one or the other.
        .filter(|c| *c == '\0' || !(c.is_control() || is_invisible(*c)))
        .collect()
}

/// Compatibility folding (Unicode NFKC, and the best fit of Windows code pages) as far as it ends in ASCII
/// that matters here.
fn ascii(c: char) -> char {
    match c {
        '\\' | '\u{2044}' | '\u{2215}' | '\u{2216}' | '\u{29f5}' | '\u{29f8}' | '\u{29f9}' | '\u{fe68}' => {
            '/'
        }
        '\u{ff3c}' | '\u{a5}' | '\u{20a9}' => '/',
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xff01 + 0x21)
            .map_or(c, |folded| if folded == '\\' { '/' } else { folded }),
        '\u{2024}' | '\u{3002}' | '\u{fe52}' | '\u{ff61}' => '.',
        '\u{2010}'..='\u{2015}' | '\u{2212}' | '\u{fe58}' | '\u{fe63}' => '-',
        '\u{131}' | '\u{130}' => 'i',
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        _ => c,
    }
}

fn is_invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2060}'..='\u{2064}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}')
}
