//! Tokens of ServiceAccounts are in nothing that the agent writes, whatever happens to them.

use std::{fs, os::unix::process::ExitStatusExt as _, process::Command};

use http::StatusCode;
use kube2ram_sandbox::{
    agent::Signal,
    standin::{StsMode, TokenRequestFault},
};

use crate::support::{CLOUDS, Lab, eventually, pod};

/// A part of each token that could be used, or that tells what is in it.
fn parts(lab: &Lab) -> Vec<String> {
    let tokens = lab.api().issued_tokens();
    tokens.iter().flat_map(|token| token.split('.').skip(1)).map(str::to_owned).collect()
}

/// Everything that can go wrong with a token, at the most talkative level. What the sandbox searches when it
/// is dropped is searched here, too, and the record of STS's stand-in.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_token_is_in_a_log_an_event_a_metric_a_document_or_the_snapshot() {
    for cloud in CLOUDS {
        let state = tempfile::Builder::new().prefix("kube2ram-test").tempdir_in("/dev/shm").unwrap();
        let flag = format!("--state-dir={}", state.path().display());
        let mut lab =
            Lab::with_agent("sa-secret", cloud, &["orders"], &["--log-level=trace", "--debug", &flag]);
        lab.assert_served("orders", "orders");
        type Fault<'a> = &'a dyn Fn(&Lab);
        let faults: [(&str, Fault<'_>); 6] = [
            ("wrong-key", &|lab| lab.api().fail_tokens(Some(TokenRequestFault::UnknownKey))),
            ("wrong-audience", &|lab| lab.api().fail_tokens(Some(TokenRequestFault::WrongAudience))),
            ("no-issuer", &|lab| lab.api().issuer().set_reachable(false)),
            ("no-provider", &|lab| lab.accounts().remove_provider(&cloud.cluster_provider())),
            ("sts-broken", &|lab| {
                let broken = StsMode::Error(StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
                lab.sts().set_mode(broken).unwrap();
            }),
            ("sts-away", &|lab| lab.sts().set_mode(StsMode::Refuse).unwrap()),
        ];
        for (name, fail) in faults {
            let before = lab.api().issued_tokens().len();
            fail(&lab);
            lab.add_account(name);
            lab.add_pod(&pod(name)).unwrap();
            lab.assert_try_again(name, name);
            // With a token in hand.
            eventually(true, || lab.api().issued_tokens().len() > before);
            let (_, explained) = lab.kube2ram(&["explain", &format!("shop/{name}"), "-o", "json"]);
            assert!(!parts(&lab).iter().any(|part| explained.contains(part)), "{name}: {explained}");
            // Back to what works.
            lab.api().fail_tokens(None);
            lab.api().issuer().set_reachable(true);
            let provider = lab.api().issuer().provider_in(cloud);
            lab.accounts().add_provider(cloud.cluster_provider(), provider);
            lab.sts().set_mode(StsMode::Ok).unwrap();
        }
        lab.agent().unwrap().restart(None).unwrap();
        lab.assert_served("orders", "orders");

        let parts = parts(&lab);
        assert!(parts.len() >= 2 * 7, "{} parts of tokens", parts.len());
        let (_, status) = lab.kube2ram(&["status", "-o", "json"]);
        let (_, store) = lab.kube2ram(&["store"]);
        let calls = format!("{:?}", lab.sts().calls());
        let events = format!("{:?}", lab.api().events());
        let agent = lab.agent().unwrap();
        let metrics = agent.admin("/metrics").unwrap().body;
        let log = agent.log();
        let mut texts = vec![status, store, calls, events, metrics, log];
        for entry in fs::read_dir(state.path()).unwrap().flatten() {
            if entry.file_type().unwrap().is_file() {
                texts.push(String::from_utf8_lossy(&fs::read(entry.path()).unwrap()).into_owned());
            }
        }
        for text in &texts {
            assert!(!text.is_empty());
            let told = parts.iter().find(|part| text.contains(*part));
            assert_eq!(told, None, "in {text}");
        }
    }
}

/// Where dumps are wanted, runs a program in the directory `$1`, for the kernel puts a dump there unless
/// `core_pattern` says otherwise.
const WITH_DUMPS: &str = r#"ulimit -c unlimited && cd "$1" && shift && exec "$@""#;

/// At the moment at which it holds a token: STS is slow.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_crash_with_a_token_in_hand_leaves_no_core_dump() {
    for cloud in CLOUDS {
        let directory = tempfile::tempdir().unwrap();
        let wrapper = ["sh", "-c", WITH_DUMPS, "sh", directory.path().to_str().unwrap()];
        let mut lab = Lab::new("sa-crash", cloud, &[]);
        lab.add_cold_pod();
        lab.prepare(&["--default-role=cold-role"]);
        lab.agent().unwrap().set_wrapper(&wrapper);
        lab.agent().unwrap().start().unwrap();
        lab.sts().set_mode(StsMode::Slow(std::time::Duration::from_secs(1))).unwrap();
        lab.assert_try_again("cold", "cold");
        assert_eq!(lab.api().issued_tokens().len(), 1);

        lab.agent().unwrap().signal(Signal::ABORT).unwrap();
        let ended = lab.agent().unwrap().wait().unwrap();

        assert_eq!((ended.signal(), ended.core_dumped()), (Some(6), false), "{ended}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "{ended}");
        // The twin: this machine writes a dump of whoever does not forbid it.
        let script = r#"kill -ABRT $$"#;
        let twin = Command::new(wrapper[0]).args(&wrapper[1..]).args(["sh", "-c", script]).status().unwrap();
        assert_eq!((twin.signal(), twin.core_dumped()), (Some(6), true), "{twin}");
    }
}
