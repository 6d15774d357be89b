use super::*;

/// Every spelling of section 4b of docs/predecessors.md, and readings of other servers.
#[test]
fn sees_through_every_known_spelling() {
    for target in [
        "/latest/meta-data/ram/security-credentials/",
        "/latest/meta-data/ram\\security-credentials/",
        "\\latest\\meta-data\\\\ram",
        "/latest/meta-data/RAM/security-credentials/",
        "/LATEST/Meta-Data/Ram",
        "/latest/meta-data/ram;x",
        "/latest/meta-data;y=1/ram;x/z",
        "/latest/meta-data/ram,1.1/x",
        "/latest/meta-data/ram.json",
        "/latest/meta-data/ram./x",
        "/latest/meta-data/ram::$DATA",
        "/latest/META-D~1/RAM/SECURI~1/x",
        "/latest/meta-data/%72am",
        "/latest/meta-data/%2572am",
        "/latest/meta-data/%252572am",
        "/latest/meta-data/%u0072am",
        "/latest/meta-data%2fram",
        "/latest/meta-data%5cram",
        "/latest/meta-data%c0%afram",
        "/latest/meta-data%e0%80%afram",
        "/latest/meta-data%f0%80%80%afram",
        "/latest/meta-data/ram%00",
        "/latest/meta-data/ram%00.html",
        "/latest/meta-data/ram%20",
        "/latest/meta-data/ram+/x",
        "/latest/meta-data/ra%0am",
        "/latest/meta-data/x/../ram",
        "/latest/meta-data/x/..;/ram",
        "/latest/meta-data/x/%2e%2e/ram",
        "/latest/meta-data/./ram",
        "/latest//meta-data//ram",
        "/latest/meta-data/ram?x",
        "/latest/meta-data/ram#x",
        "/latest/x#/meta-data/ram",
        "/latest/x?/../meta-data/ram",
        "/latest/meta-data?/ram",
        "/latest?x=/security-credentials",
        "http://100.100.100.200/latest/meta-data/ram/",
        "/latest/meta-data/\u{ff52}\u{ff41}\u{ff4d}",
        "/latest\u{ff0f}meta-data\u{2215}ram",
        "/latest/meta\u{2010}data/ram",
        "/latest/meta-data/r\u{200b}am",
        "/latest/\u{17f}ecurity-credentials",
        "/latest/meta-data/all",
        "\t/latest/meta-data/ram",
    ] {
        assert!(could_mean(target.as_bytes(), CREDENTIALS), "{target:?}");
    }
    assert!(could_mean(b"/latest/meta-data\xafram", CREDENTIALS), "with a seven-bit reader");
    for target in [
        "/latest/user-data",
        "/User-Data.txt",
        "/user-data%2etxt",
        "/vendor-data%zz",
        "/latest/dynamic/instance%2Didentity/document",
    ] {
        assert!(could_mean(target.as_bytes(), SENSITIVE), "{target:?}");
    }
}

/// The model itself must recognise these.
#[test]
fn calls_ordinary_items_harmless() {
    for target in [
        "/",
        "/latest/",
        "/latest/meta-data/",
        "/latest/meta-data/instance-id",
        "/latest/meta-data/network/interfaces/macs/00:16:3e:0f:11:22/",
        "/latest/meta-data/rambling",
        "/latest/meta-data/x/ram",
        "/latest/meta-data/allocation",
        "/latest/dynamic/instance-identity/pkcs7?audience=ram/meta-data",
        "/latest/api/token?",
        "/latest/meta-data&ram",
        "/2016-01-01/meta-data/region-id?a=b%20c",
    ] {
        assert!(!could_mean(target.as_bytes(), CREDENTIALS), "{target:?}");
    }
    for target in ["/latest/meta-data/instance-id", "/latest/vendor-data%4fx", "/latest/user-datax%2e"] {
        assert!(!could_mean(target.as_bytes(), SENSITIVE), "{target:?}");
    }
}
