//! What a target could mean to some server, and targets that confuse parsers. Shares nothing with the parser.

use proptest::prelude::*;

/// As [`could_mean`], for what is closed on Alibaba Cloud.
pub(super) fn could_mean_credentials(raw: &[u8]) -> bool {
    could_mean(raw, |path| {
        path.windows(2).any(|pair| matches!(pair, ["meta-data", "ram" | "all"]))
            || path.contains(&"security-credentials")
    })
}

/// An independent, deliberately generous reader: decodes up to three times, ignores case, blanks and
/// parameters, cuts where some server might, folds slashes and dots. Whether any such reading lands below a
/// closed directory. Only that the first raw `?` ends the path is taken for granted.
pub(super) fn could_mean(raw: &[u8], is_closed: impl Fn(&[&str]) -> bool) -> bool {
    let path = raw.split(|byte| *byte == b'?').next().unwrap_or_default();
    let mut views = vec![path.to_vec()];
    for level in 0..3 {
        views.push(decoded_once(&views[level]));
    }
    let mut readings = Vec::new();
    for view in views {
        let text = String::from_utf8_lossy(&view).to_lowercase().replace('\\', "/");
        let text: String = text.chars().filter(|c| !matches!(c, ' ' | '\t' | '\r' | '\n')).collect();
        for cut in [&[][..], &['?'], &['#'], &['\0'], &[';'], &['?', '#', '\0'], &['?', '#', '\0', ';']] {
            readings.push(text.split(cut).next().unwrap_or_default().to_owned());
        }
        let without_parameters = |s: &str| s.split(';').next().unwrap_or_default().to_owned();
        readings.push(text.split('/').map(without_parameters).collect::<Vec<_>>().join("/"));
    }
    readings.iter().any(|reading| {
        let mut resolved: Vec<&str> = Vec::new();
        for segment in reading.split('/') {
            match segment {
                "" | "." => {}
                ".." => drop(resolved.pop()),
                _ => resolved.push(segment),
            }
        }
        let kept =
            reading.split('/').filter(|segment| !matches!(*segment, "" | "." | "..")).collect::<Vec<_>>();
        is_closed(&resolved) || is_closed(&kept)
    })
}

fn decoded_once(raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < raw.len() {
        let escape =
            raw.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(str::from_utf8(hex).ok()?, 16).ok());
        match (raw[at], escape) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    out
}

/// Targets made of the pieces that confuse parsers.
pub(super) fn confusing() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => Just("/"),
        2 => Just("latest"), 3 => Just("meta-data"), 1 => Just("Meta-Data"), 1 => Just("meta%2ddata"),
        3 => Just("ram"), 1 => Just("RAM"), 1 => Just("%72am"), 1 => Just("%2572am"),
        2 => Just("security-credentials"), 1 => Just("all"), 1 => Just("user-data"),
        1 => Just("//"), 1 => Just("\\"), 1 => Just("%2f"), 1 => Just("%5c"), 1 => Just("%252f"), 1 => Just("%255c"),
        1 => Just("/./"), 1 => Just("/../"), 1 => Just("/%2e%2e/"), 1 => Just("/%2e/"), 1 => Just("x"),
        1 => Just(";x"), 1 => Just("%3b"), 1 => Just("?"), 1 => Just("%3f"), 1 => Just("#"), 1 => Just("%23"),
        1 => Just("%00"), 1 => Just("%20"), 1 => Just("%09"), 1 => Just("\t"), 1 => Just("http://100.100.100.200"),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| {
        let target = pieces.concat();
        (if target.starts_with(['/', 'h']) { target } else { format!("/{target}") }).into_bytes()
    })
}
