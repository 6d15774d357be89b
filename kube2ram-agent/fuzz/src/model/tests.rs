use kube2ram_cloud::Cloud;

use super::*;

fn is_closed(target: &[u8], cloud: Cloud) -> bool {
    could_mean(target, Tree::of(cloud).credentials)
}

fn is_sensitive(target: &[u8], cloud: Cloud) -> bool {
    could_mean(target, Tree::of(cloud).sensitive)
}

/// As it is on AWS.
fn translated(target: &str) -> String {
    [
        ("RAM", "IAM"),
        ("Ram", "Iam"),
        ("ram", "iam"),
        ("72am", "69am"),
        ("ra%0a", "ia%0a"),
        ("r\u{200b}", "i\u{200b}"),
        ("\u{ff52}", "\u{ff49}"),
    ]
    .into_iter()
    .fold(target.to_owned(), |target, (from, to)| target.replace(from, to))
}

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
        "/latest/meta-data/+/ram",
        "/latest/meta-data/,1/ram",
        "/latest/meta-data/.../ram",
        "/latest/meta-data/x/..,1/ram",
        "/latest/meta-data/x/..+/ram",
        "\t/latest/meta-data/ram",
    ] {
        assert!(is_closed(target.as_bytes(), Cloud::Alibaba), "{target:?}");
        let target = translated(target);
        assert!(is_closed(target.as_bytes(), Cloud::Aws), "{target:?}");
    }
    assert!(is_closed(b"/latest/meta-data\xafram", Cloud::Alibaba), "with a seven-bit reader");
    assert!(is_closed(b"/latest/meta-data/all", Cloud::Alibaba));
    for target in [
        "/latest/user-data",
        "/User-Data.txt",
        "/user-data%2etxt",
        "/vendor-data%zz",
        "/latest/dynamic/instance%2Didentity/document",
    ] {
        assert!(is_sensitive(target.as_bytes(), Cloud::Alibaba), "{target:?}");
    }
}

#[test]
fn knows_what_is_on_aws_only() {
    for target in [
        "/latest/meta-data/iam/security-credentials-extended/r",
        "/latest/meta-data/security-credentials-extended.json",
        "/latest/x/Security-Credentials%2Dnode",
        "/latest?x=/security-credentialsx",
        "/latest/SECURI~1/x",
        "/latest//meta-data//identity-credentials//ec2",
        "/latest/meta-data/IDENTI~1",
        "/latest/meta-data/identity-credentials,1",
    ] {
        assert!(is_closed(target.as_bytes(), Cloud::Aws), "{target:?}");
    }
    for target in [
        "/latest//user-data",
        "/latest/meta-data/managed-ssh-keys/signer-key",
        "/latest/dynamic/instance-identity/pkcs7",
        "/latest/dynamic/instance-identity/document/..,1/rsa2048",
        "/latest/dynamic/instance-identity/./Signature;x",
        "/latest/dynamic/instance-identity?/pkcs7",
    ] {
        assert!(is_sensitive(target.as_bytes(), Cloud::Aws), "{target:?}");
    }
}

#[test]
fn a_list_holds_its_items_and_whole_directories() {
    let listed = ["meta-data", "meta-data/mac", "meta-data/spot/"];

    for target in [
        "/",
        "/latest/",
        "/x/meta-data/",
        "/latest/meta-data/mac?x",
        "/x/meta-data/spot",
        "/x/meta-data/spot/y",
    ] {
        assert!(is_listed(target, &listed), "{target}");
    }
    for target in
        ["/latest/mac", "/latest/meta-data/Mac", "/latest/meta-data/mac/x", "/latest/meta-data/spotted"]
    {
        assert!(!is_listed(target, &listed), "{target}");
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
        for cloud in Cloud::ALL {
            assert!(!is_closed(target.as_bytes(), cloud), "{target:?} {cloud:?}");
        }
    }
    for target in ["/latest/meta-data/instance-id", "/latest/vendor-data%4fx", "/latest/user-datax%2e"] {
        for cloud in Cloud::ALL {
            assert!(!is_sensitive(target.as_bytes(), cloud), "{target:?} {cloud:?}");
        }
    }
    for cloud in Cloud::ALL {
        let tree = Tree::of(cloud);
        for target in tree.needed {
            assert!(
                !is_closed(target.as_bytes(), cloud) && !is_sensitive(target.as_bytes(), cloud),
                "{target}"
            );
            assert!(is_listed(target, tree.listed), "{target}");
        }
    }
    for target in ["/latest/meta-data/iam-x", "/latest/meta-data/x/iam", "/latest/insecurity-credentials"] {
        assert!(!is_closed(target.as_bytes(), Cloud::Aws), "{target}");
    }
}
