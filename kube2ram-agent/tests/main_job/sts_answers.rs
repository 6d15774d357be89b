//! docs/sts.md, row by row: what a pod gets for each answer of STS, without credentials and with valid ones,
//! and who is told.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, Instant},
};

use http::StatusCode;
use kube2ram_sandbox::{node::PodSpec, standin::Accounts};

use crate::support::{LIST, Lab, assert_in_time, assert_try_again, eventually};

/// As long as credentials last here: asked for again after 24 to 29 s, a denial confirmed within 17 s more,
/// all before the end.
const LIFETIME: Duration = Duration::from_secs(60);

/// One answer of STS, and the pod whose role gets it.
struct Row {
    pod: String,
    status: StatusCode,
    /// Empty for a page.
    code: String,
    kind: Kind,
}

/// The document's text for one `result`.
#[derive(Clone, Debug)]
struct Kind {
    result: String,
    status: u16,
    is_kept: bool,
    event: String,
    alert: String,
}

impl Row {
    fn role(&self) -> String {
        format!("{}-role", self.pod)
    }

    fn arn(&self) -> String {
        Accounts::role_arn(&self.role())
    }

    fn is_throttling(&self) -> bool {
        self.kind.result == "throttled"
    }
}

/// The cells of the tables' rows that have `columns` of them, without the backticks.
fn cells(document: &str, columns: usize) -> Vec<Vec<String>> {
    let rows = document.lines().filter_map(|line| line.strip_prefix('|')?.strip_suffix('|'));
    let rows = rows.map(|row| row.split('|').map(|cell| cell.trim().replace('`', "")).collect::<Vec<_>>());
    rows.filter(|row| row.len() == columns && !row[0].starts_with("---")).skip(1).collect()
}

fn document(name: &str) -> String {
    fs::read_to_string(format!("{}/../{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn kinds() -> BTreeMap<String, Kind> {
    let kinds = cells(&document("docs/sts.md"), 6).into_iter().map(|row| {
        let is_kept = match &*row[3] {
            "kept" => true,
            "dropped when confirmed" => false,
            other => panic!("{other}"),
        };
        let [result, event, alert] = [&row[0], &row[4], &row[5]].map(Clone::clone);
        Kind { result, status: row[2].parse().unwrap(), is_kept, event, alert }
    });
    kinds.map(|kind| (kind.result.clone(), kind)).collect()
}

fn rows() -> Vec<Row> {
    let kinds = kinds();
    let rows = cells(&document("docs/sts.md"), 4).into_iter().enumerate().map(|(index, row)| Row {
        pod: format!("row-{index}"),
        status: row[0].parse().unwrap(),
        code: if row[1] == "a page" { String::new() } else { row[1].clone() },
        kind: kinds[&row[2]].clone(),
    });
    rows.collect()
}

/// STS answers each row's role in the row's way.
fn refuse(lab: &Lab, rows: &[Row]) {
    for row in rows {
        lab.sts().refuse(&row.arn(), row.status, &row.code);
    }
}

/// How often the agent has written that a role's credentials were not issued, for this kind of reason.
fn count_failures(log: &str, row: &Row) -> usize {
    let (role, kind) = (row.arn(), format!("kind=\"{}\"", row.kind.result));
    let lines = log.lines().filter(|line| line.contains("credentials not issued") && line.contains(&role));
    lines.filter(|line| line.contains(&kind) && line.contains(&row.code)).count()
}

/// A pod that has no credentials gets the row's status in time, and the log has role, kind and code.
fn assert_cold(lab: &mut Lab, row: &Row) {
    let what = format!("{} {:?}", row.status, row.code);
    let reply = lab.ask(&row.pod, &format!("{LIST}{}", row.role()));
    assert_in_time(&reply);
    assert_eq!(reply.status, row.kind.status, "{what}: {reply:?}");
    if row.kind.status == 503 {
        assert_try_again(&reply);
    } else {
        assert_eq!(reply.body.trim(), "the role cannot be assumed", "{what}");
    }
    eventually(true, || count_failures(&lab.agent().unwrap().log(), row) > 0);
}

/// A pod that has valid credentials keeps them, or loses them to the second denial and not to the first.
fn assert_held(lab: &mut Lab, rows: &[Row]) {
    lab.sts().set_lifetime(Some(LIFETIME));
    // Of the first ones, which others are issued after.
    let end = Instant::now() + LIFETIME - Duration::from_secs(8);
    for row in rows {
        eventually(row.role(), || lab.credentials(&row.pod, &row.role()));
    }
    let before = lab.agent().unwrap().log().len();
    refuse(lab, rows);

    let mut pending = rows.iter().collect::<Vec<_>>();
    while !pending.is_empty() {
        assert!(
            Instant::now() < end,
            "still pending: {:?}",
            pending.iter().map(|row| &row.code).collect::<Vec<_>>()
        );
        pending.retain(|row| {
            let answer = lab.credentials(&row.pod, &row.role());
            let failures = count_failures(&lab.agent().unwrap().log()[before..], row);
            match (row.kind.is_kept, answer.as_str()) {
                (true, answer) => {
                    assert_eq!(answer, row.role(), "{} {:?} after {failures}", row.status, row.code);
                    failures == 0
                }
                (false, "403") => {
                    // The log is written by its own thread.
                    eventually(2, || count_failures(&lab.agent().unwrap().log()[before..], row));
                    false
                }
                (false, answer) => {
                    assert_eq!(answer, row.role(), "{} {:?}", row.status, row.code);
                    true
                }
            }
        });
        thread::sleep(Duration::from_millis(200));
    }
    // Those that failed first are kept as well while the others were waited for.
    for row in rows.iter().filter(|row| row.kind.is_kept) {
        assert_eq!(lab.credentials(&row.pod, &row.role()), row.role(), "{} {:?}", row.status, row.code);
    }
}

fn assert_table(name: &str, rows: &mut [Row]) {
    // The agent writes 25 Events at once and few afterwards: one of each kind is among them.
    let mut seen = BTreeMap::new();
    rows.sort_by_cached_key(|row| {
        let nth = seen.entry(row.kind.result.clone()).or_insert(0);
        *nth += 1;
        *nth
    });
    let pods = rows.iter().map(|row| PodSpec::new(&row.pod).role(&row.role()).host_network());
    let mut lab = Lab::new(name, &pods.collect::<Vec<_>>());
    refuse(&lab, rows);
    lab.start(&[]);

    for row in rows.iter() {
        assert_cold(&mut lab, row);
    }
    let expected = seen.keys().cloned().collect::<Vec<_>>();
    eventually(expected, || {
        let mut told = Vec::new();
        for event in lab.api().events() {
            let pod = event["regarding"]["name"].as_str().unwrap();
            let row = rows.iter().find(|row| row.pod == pod).unwrap();
            assert_eq!(event["reason"], row.kind.event, "{event}");
            told.push(row.kind.result.clone());
        }
        told.sort();
        told.dedup();
        told
    });

    // Another process has forgotten all failures.
    lab.sts().refuse_none();
    lab.agent().unwrap().restart(None).unwrap();
    assert_held(&mut lab, rows);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_answer_of_sts_gives_a_pod_the_documented_answer() {
    let mut rows = rows();
    rows.retain(|row| !row.is_throttling());
    assert!(rows.len() > 25, "{}", rows.len());
    assert_table("sts-answers", &mut rows);
}

/// In its own sandbox: what throttles one role makes all others wait.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_way_of_throttling_gives_a_pod_the_documented_answer() {
    let mut rows = rows();
    rows.retain(Row::is_throttling);
    assert!(rows.len() > 3, "{}", rows.len());
    assert_table("sts-throttles", &mut rows);
}

#[test]
fn each_kind_of_answer_has_an_alert_that_fires() {
    let rules = document("deploy/monitoring/rules.yaml");
    for kind in kinds().values() {
        let after = rules.split(&format!("alert: {}\n", kind.alert)).nth(1).unwrap();
        let rule = after.split("- alert:").next().unwrap();
        // What is refused is counted by session: one call may have failed for another reason.
        let heard = if kind.is_kept { kind.result.as_str() } else { r#"state="denied""# };
        assert!(rule.contains(heard), "{kind:?}: {rule}");
    }
}
