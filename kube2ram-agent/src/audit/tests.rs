use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
};

use jiff::Timestamp;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tempfile::TempDir;
use tracing_subscriber::fmt::MakeWriter;

use super::*;
use kube2ram_cloud::role::{ExternalId, Grant, RoleArn, ServiceAccount, SessionName, SessionPolicy};

struct Noon;

impl Clock for Noon {
    fn now(&self) -> Timestamp {
        noon()
    }
}

fn noon() -> Timestamp {
    "2026-11-21T12:00:00.123456789Z".parse().unwrap()
}

fn uid(n: u32) -> PodUid {
    PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
}

/// Pod 0 is known to nobody.
fn pod(uid: &PodUid) -> Option<Arc<Pod>> {
    let pod = Pod {
        uid: uid.clone(),
        namespace: "shop".into(),
        name: format!("web-{}", uid.as_str().trim_start_matches(['0', '4', '8', '-'])).into(),
        service_account: "web".into(),
        account_annotations: None,
        is_mirror: false,
        host_network: false,
        annotations: [].into(),
    };
    (*uid != self::uid(0)).then(|| Arc::new(pod))
}

fn session() -> RoleSession {
    RoleSession {
        role: RoleArn::parse("acs:ram::1234567890123456:role/shop-web").unwrap(),
        grant: Grant::ASSUME_ROLE,
        policy: None,
        session_name: SessionName::parse("shop.web").unwrap(),
        duration: Duration::from_hours(1),
        tags: [].into(),
        source_identity: None,
    }
}

fn credentials(access_key_id: &str) -> Credentials {
    Credentials {
        access_key_id: access_key_id.into(),
        access_key_secret: "hush-secret".into(),
        security_token: "hush-token".into(),
        issued_at: noon(),
        expires_at: noon() + Duration::from_hours(1),
        request_id: Some("B8C7-1".into()),
        document: Default::default(),
    }
}

struct Bench {
    directory: TempDir,
    registry: Registry,
    trail: Trail,
}

impl Bench {
    /// With a file.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut registry = Registry::default();
        let trail = trail(Some(directory.path().join("audit.jsonl")), &mut registry);
        Self { directory, registry, trail }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("audit.jsonl")
    }

    async fn lines(&self) -> Vec<String> {
        self.trail.flush().await;
        lines(&self.path())
    }

    fn count(&self, result: &str) -> u64 {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        let name = format!("audit_records_total{{result=\"{result}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
    }
}

fn trail(file: Option<PathBuf>, registry: &mut Registry) -> Trail {
    Trail::start("node-1", Arc::new(Noon), pod, file, Metrics::new(registry)).unwrap()
}

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap().lines().map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn an_issue_and_a_delivery_are_one_line_each_with_the_pods_names() {
    let bench = Bench::new();
    bench.trail.issued(&session(), &credentials("STS.1"), &uid(1));
    let exchanged = RoleSession {
        grant: Grant::ServiceAccount(ServiceAccount { namespace: "shop".into(), name: "web".into() }),
        ..session()
    };
    bench.trail.delivered(&exchanged, &Credentials { request_id: None, ..credentials("STS.2") }, &uid(0));

    let lines = bench.lines().await;

    assert_eq!(
        lines,
        [
            r#"{"at":"2026-11-21T12:00:00.123Z","event":"issued","node":"node-1","access_key_id":"STS.1","request_id":"B8C7-1","role":"acs:ram::1234567890123456:role/shop-web","session":"shop.web","grant":"assume_role","service_account":"shop/web","pod.namespace":"shop","pod.name":"web-1","pod.uid":"00000000-0000-4000-8000-000000000001","expires_at":"2026-11-21T13:00:00.123Z"}"#,
            r#"{"at":"2026-11-21T12:00:00.123Z","event":"delivered","node":"node-1","access_key_id":"STS.2","request_id":null,"role":"acs:ram::1234567890123456:role/shop-web","session":"shop.web","grant":"service_account","service_account":"shop/web","pod.namespace":null,"pod.name":null,"pod.uid":"00000000-0000-4000-8000-000000000000","expires_at":"2026-11-21T13:00:00.123Z"}"#,
        ]
    );
    assert_eq!((bench.count("written"), bench.count("dropped"), bench.count("error")), (2, 0, 0));
}

#[tokio::test]
async fn of_pods_beyond_the_bound_the_first_is_recorded_and_all_answers_are_counted() {
    let bench = Bench::new();
    bench.trail.issued(&session(), &credentials("STS.1"), &uid(1));
    for is_first in [true, false, false] {
        bench.trail.not_recorded(&session(), &credentials("STS.1"), &uid(2), is_first);
    }

    let lines = bench.lines().await;

    assert!(lines.len() == 2 && lines[1].contains(r#""event":"not_recorded""#), "{lines:?}");
    let remembered: Vec<_> =
        bench.trail.remembered("STS.1").into_iter().map(|record| (record.event, record.pod.uid)).collect();
    assert_eq!(remembered, [(Event::Issued, uid(1)), (Event::NotRecorded, uid(2))]);
    assert_eq!((bench.count("not_recorded"), bench.count("dropped")), (3, 0));
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[test]
fn the_log_line_has_the_fields_of_the_file_and_no_record_has_a_secret() {
    let logged = Lines::default();
    let subscriber =
        tracing_subscriber::fmt().json().flatten_event(true).with_writer(logged.clone()).finish();
    let trail = trail(None, &mut Registry::default());
    let session = RoleSession {
        grant: Grant::AssumeRole { external_id: Some(ExternalId::parse("hush-id").unwrap()) },
        policy: Some(SessionPolicy::parse(r#"{"Statement":"hush"}"#).unwrap()),
        ..session()
    };

    tracing::subscriber::with_default(subscriber, || {
        trail.issued(&session, &credentials("STS.1"), &uid(1));
        trail.delivered(&session, &credentials("STS.1"), &uid(1));
    });

    let text = String::from_utf8(logged.0.lock().unwrap().clone()).unwrap();
    let remembered = trail.remembered("STS.1");
    let (issued, delivered) = text.split_once('\n').unwrap();
    for (line, record) in [(issued, &remembered[0]), (delivered.trim_end(), &remembered[1])] {
        let logged: serde_json::Value = serde_json::from_str(line).unwrap();
        let serde_json::Value::Object(fields) = serde_json::to_value(record).unwrap() else { panic!() };
        for (name, value) in fields.iter().filter(|(name, _)| *name != "at") {
            assert_eq!(&logged[name], value, "{name}");
        }
        assert_eq!(logged["target"], TARGET);
        assert_eq!(logged["message"], format!("credentials {}", record.event.as_str()));
    }
    let all = format!("{text}{remembered:?}{trail:?}");
    assert!(all.contains("STS.1") && !all.contains("hush"), "{all}");
}

#[tokio::test]
async fn the_file_is_for_root_alone_and_goes_on_after_a_restart() {
    let bench = Bench::new();
    bench.trail.issued(&session(), &credentials("STS.1"), &uid(1));
    assert_eq!(bench.lines().await.len(), 1);
    assert_eq!(fs::metadata(bench.path()).unwrap().mode() & 0o777, 0o600);

    let next = trail(Some(bench.path()), &mut Registry::default());
    next.issued(&session(), &credentials("STS.2"), &uid(1));
    next.flush().await;

    let lines = lines(&bench.path());
    assert!(lines.len() == 2 && lines[1].contains("STS.2"), "{lines:?}");
}

#[tokio::test]
async fn records_that_cannot_be_written_are_counted_and_named_in_the_next_one() {
    let bench = Bench::new();
    let missing = bench.directory.path().join("missing");
    let mut registry = Registry::default();
    let trail = trail(Some(missing.join("audit")), &mut registry);
    for n in 0..3 {
        trail.issued(&session(), &credentials(&format!("STS.{n}")), &uid(1));
    }
    trail.flush().await;

    fs::DirBuilder::new().create(&missing).unwrap();
    fs::set_permissions(&missing, fs::Permissions::from_mode(0o700)).unwrap();
    trail.issued(&session(), &credentials("STS.3"), &uid(1));
    trail.issued(&session(), &credentials("STS.4"), &uid(1));
    trail.flush().await;

    let lines = lines(&missing.join("audit"));
    assert!(lines[0].contains("STS.3") && lines[0].ends_with(r#","lost":3}"#), "{lines:?}");
    assert!(lines[1].contains("STS.4") && !lines[1].contains("lost"), "{lines:?}");
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    for sample in [r#"{result="error"} 3"#, r#"{result="written"} 2"#, r#"{result="dropped"} 0"#] {
        assert!(text.contains(sample), "{sample} in {text}");
    }
    assert_eq!(trail.remembered("STS.0").len(), 1, "in memory all the same");
}

#[tokio::test]
async fn a_full_queue_drops_counts_logs_once_and_never_waits() {
    let logged = Lines::default();
    let subscriber = tracing_subscriber::fmt().with_writer(logged.clone()).finish();
    let _active = tracing::subscriber::set_default(subscriber);
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let (writer, mut messages) = Writer::without_thread(metrics.clone());
    let record = |n: usize| {
        let of = (&uid(1), None);
        Record::new(Event::Issued, noon(), "n", &session(), &credentials(&format!("STS.{n}")), of)
    };

    for n in 0..300 {
        writer.write(record(n));
    }

    assert_eq!(metrics.dropped.get(), 300 - 256);
    let text = String::from_utf8(logged.0.lock().unwrap().clone()).unwrap();
    assert_eq!(text.matches("audit records are dropped").count(), 1, "{text}");
    assert!(!writer.flush(Duration::from_millis(10)).await, "a disk that hangs is not waited for");
    let mut waiting = 0;
    while messages.try_recv().is_ok() {
        waiting += 1;
    }
    assert_eq!(waiting, 256);
    assert_eq!(writer.lost(), 44, "for the next record");
}

#[test]
fn the_last_sessions_are_remembered_within_their_bounds() {
    let record = |event, n: usize, pod: u32| {
        let uid = uid(pod);
        let of = self::pod(&uid);
        let credentials = credentials(&format!("STS.{n}"));
        Record::new(event, noon(), "n", &session(), &credentials, (&uid, of.as_deref()))
    };
    let mut memory = Memory::new(10, 1_000_000);
    for n in 0..20 {
        memory.issued(record(Event::Issued, n, 1));
    }
    memory.delivered(&record(Event::Delivered, 19, 1));
    memory.delivered(&record(Event::Delivered, 19, 2));
    memory.delivered(&record(Event::Delivered, 3, 2));
    let of_19: Vec<_> =
        memory.find("STS.19").iter().map(|found| (found.event, found.pod.uid.clone())).collect();
    assert_eq!(of_19, [(Event::Issued, uid(1)), (Event::Delivered, uid(1)), (Event::Delivered, uid(2))]);
    assert_eq!((memory.find("STS.9").len(), memory.find("STS.10").len()), (0, 1));
    assert_eq!(memory.size().0, 10);

    let mut small = Memory::new(1024, 20_000);
    for n in 0..200 {
        small.issued(record(Event::Issued, n, 1));
        small.delivered(&record(Event::Delivered, n, 2));
        assert!(small.size().1 <= 20_000);
    }
    let (sessions, bytes) = small.size();
    assert!((5..60).contains(&sessions) && bytes > 15_000, "{sessions} sessions in {bytes} bytes");
    assert_eq!(small.find("STS.199").len(), 2, "the last one stays");
    for n in 0..200 {
        small.delivered(&record(Event::Delivered, 199, n));
    }
    assert!(small.size().1 <= 20_000, "also if one session has too many pods");
}

#[tokio::test]
async fn a_session_is_found_in_the_file_and_in_the_one_before_among_lines_that_are_no_records() {
    let bench = Bench::new();
    bench.trail.issued(&session(), &credentials("STS.1"), &uid(1));
    bench.trail.issued(&session(), &credentials("STS.10"), &uid(1));
    bench.lines().await;
    let former = bench.directory.path().join("audit.jsonl.1");
    fs::rename(bench.path(), &former).unwrap();
    let mut text = fs::read(&former).unwrap();
    text.extend([b"STS.1 {\n\xff STS.1\n".as_slice(), &[b'x'; 40_000], b"STS.1\n"].concat());
    fs::write(&former, text).unwrap();
    bench.trail.delivered(&session(), &credentials("STS.1"), &uid(2));
    bench.lines().await;

    let of = |path: &Path, id: &str| {
        let found = find(path, id);
        assert!(found.failure.is_none(), "{found:?}");
        found.records
    };
    let found = of(&bench.path(), "STS.1");

    let events: Vec<_> = found.iter().map(|record| (record.event, record.pod.name.as_deref())).collect();
    assert_eq!(events, [(Event::Issued, Some("web-1")), (Event::Delivered, Some("web-2"))]);
    assert_eq!(found[0], bench.trail.remembered("STS.1")[0]);
    assert_eq!(of(&bench.path(), "STS.2"), []);
    assert_eq!(of(&bench.directory.path().join("none"), "STS.1"), []);

    fs::set_permissions(bench.path(), fs::Permissions::from_mode(0o622)).unwrap();
    let one = find(&bench.path(), "STS.1");
    assert!(matches!(one.failure, Some(FileError::Unsafe(_))), "{one:?}");
    assert_eq!(one.records, found[..1], "the other file's, all the same");
    fs::set_permissions(bench.path(), fs::Permissions::from_mode(0o600)).unwrap();
    // As while the file is renamed between the two looks.
    fs::remove_file(&former).unwrap();
    fs::hard_link(bench.path(), &former).unwrap();
    assert_eq!(of(&bench.path(), "STS.1"), found[1..], "once");
}
