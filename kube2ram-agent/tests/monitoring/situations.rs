//! Each situation as its operator sees it: a real Prometheus scrapes the real agent, with the shipped rules
//! in a hurry (`Prometheus::HASTE`).

use std::{
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Sandbox,
    prometheus::{Prometheus, Series, hastened},
    situation::Situation,
    standin::AccessKey,
};

use crate::{dashboard::targets, program, promtool, rules};

/// How long a situation may take to be noticed, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(90);
/// Longer than any rule looks back and waits, hastened.
const ALL_WELL_FOR: Duration = Duration::from_secs(25);

/// A situation that goes on, and who watches.
struct Scene {
    situation: Situation,
    // Dropped first.
    prometheus: Prometheus,
    sandbox: Sandbox,
    began: Instant,
}

impl Scene {
    fn begin(situation: Situation) -> Option<Self> {
        program("prometheus")?;
        let mut sandbox = Sandbox::create(situation.name()).unwrap();
        Situation::set_the_stage(&mut sandbox).unwrap();
        sandbox.api().bookmark_every(Duration::from_secs(60) / Prometheus::HASTE);
        let agent = sandbox.start_agent(env!("CARGO_BIN_EXE_kube2ram").as_ref(), Situation::FLAGS).unwrap();
        let addr = agent.admin_addr();
        let directory = sandbox.node().directory();
        let prometheus = Prometheus::start(&directory, addr, Sandbox::NODE, &rules()).unwrap();
        let began = Instant::now();
        let mut scene = Self { situation, prometheus, sandbox, began };
        // Prometheus takes up to ten seconds to take notice of its targets, which is long enough for them to
        // count as absent; and an increase has a before.
        scene.until("a first scrape", |scene| {
            !scene.prometheus.query("kube2ram_ready").unwrap().is_empty()
                && scene.prometheus.firing().unwrap().is_empty()
        });
        scene.began = Instant::now();
        situation.bring_about(&mut scene.sandbox).unwrap();
        Some(scene)
    }

    /// Goes on until something is so.
    fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "not in time: {what}; firing: {:?}", self.prometheus.firing());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The same while the situation goes on.
    fn go_on_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "not in time: {what}; firing: {:?}", self.prometheus.firing());
            self.situation.go_on(&mut self.sandbox).unwrap();
        }
    }

    /// All of these fire at some time, and besides them none but `others`.
    fn assert_alerts(&mut self, expected: &[&str], others: &[&str]) {
        for alert in expected {
            self.go_on_until(alert, |scene| {
                scene.prometheus.firing().unwrap().iter().any(|name| name == alert)
            });
        }
        let ever = r#"count by (alertname) (ALERTS{alertstate="firing"})"#;
        for series in self.prometheus.query_range(ever, self.began.elapsed()).unwrap() {
            let alert = series.label("alertname").unwrap();
            let is_meant = expected.contains(&alert) || others.contains(&alert);
            let pending = || self.prometheus.query_range("kube2ram_pending_conditions", self.began.elapsed());
            assert!(is_meant, "{alert} fires too; {:?}", pending());
        }
    }

    /// No panel is empty.
    fn assert_panels(&self) {
        for target in targets(Sandbox::NODE) {
            let found =
                self.prometheus.query_range(&hastened(&target.expression), self.began.elapsed()).unwrap();
            assert!(!found.is_empty(), "panel {:?} is empty: {}", target.panel, target.expression);
        }
    }

    /// The greatest and the least that a panel shows, of the series with this label.
    fn panel(&self, title: &str, label: Option<(&str, &str)>) -> (f64, f64) {
        let is_meant = |series: &Series| label.is_none_or(|(name, value)| series.label(name) == Some(value));
        let mut values = Vec::new();
        for target in targets(Sandbox::NODE).iter().filter(|target| target.panel == title) {
            let found =
                self.prometheus.query_range(&hastened(&target.expression), self.began.elapsed()).unwrap();
            values.extend(
                found.iter().filter(|series| is_meant(series)).flat_map(|series| series.values.clone()),
            );
        }
        assert!(!values.is_empty(), "panel {title:?} shows nothing of {label:?}");
        values.iter().fold((f64::MIN, f64::MAX), |(most, least), value| (most.max(*value), least.min(*value)))
    }

    fn most(&self, title: &str, label: (&str, &str)) -> f64 {
        self.panel(title, Some(label)).0
    }

    /// Reason, kind of the object, its name and the text of each Event.
    fn events(&self) -> Vec<[String; 4]> {
        let events = self.sandbox.api().events();
        assert!(!serde_json::to_string(&events).unwrap().contains(AccessKey::SECRET_MARKER));
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let of = |event: &serde_json::Value| {
            [&event["reason"], &event["regarding"]["kind"], &event["regarding"]["name"], &event["note"]]
                .map(text)
        };
        events.iter().map(of).collect()
    }

    /// There is one Event, of this reason, on the pod that suffers, with all of these words.
    fn assert_event(&mut self, reason: &str, words: &[&str]) {
        let (pod, role) = self.situation.victim().unwrap();
        self.go_on_until("the Event", |scene| !scene.events().is_empty());
        let events = self.events();
        let [[found, kind, name, note]] = &events[..] else { panic!("{events:?}") };
        assert_eq!([found, kind, name], [reason, "Pod", pod]);
        for word in words.iter().chain([&role]) {
            assert!(note.contains(word), "{note}");
        }
        assert!(!note.contains(Situation::ORDERS), "names another pod: {note}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn all_well_fires_nothing_and_fills_every_panel() {
    let Some(mut scene) = Scene::begin(Situation::AllWell) else { return };

    scene.go_on_until("time", |scene| scene.began.elapsed() > ALL_WELL_FOR);

    scene.assert_alerts(&[], &[]);
    scene.assert_panels();
    assert_eq!(scene.events(), <[[String; 4]; 0]>::default());
    assert_eq!(scene.panel("Firing alerts", None).0, 0.0);
    assert!(scene.most("Requests by route", ("route", "credentials")) > 0.0);
    assert!(scene.most("Connections by caller", ("outcome", "pod")) > 0.0);
    assert_eq!(scene.panel("Role sessions by state", Some(("state", "fresh"))), (1.0, 0.0));
    let metrics = scene.sandbox.agent().unwrap().admin("/metrics").unwrap().body;
    let (is_right, said) = promtool(&["check", "metrics"], &metrics).unwrap();
    assert!(is_right && said.trim().is_empty(), "{said}");
    assert_is_documented(&metrics);
}

/// The table of metrics is made of the registry without an agent: this is what keeps it whole.
fn assert_is_documented(metrics: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let table = std::fs::read_to_string(path).unwrap();
    for line in metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        assert!(table.contains(&format!("| `{name}` | {kind} |")), "docs/metrics.md lacks {name}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_denied_role_is_reported_by_event_alert_and_panel() {
    let Some(mut scene) = Scene::begin(Situation::RoleDenied) else { return };

    scene.assert_alerts(&["Kube2ramDenialsSurge"], &[]);

    scene.assert_event("RoleDenied", &["ram.aliyuncs.com/allowed-roles", Situation::NAMESPACE]);
    assert!(scene.most("Denials by reason", ("reason", "namespace_forbids")) > 0.0);
    assert_eq!(scene.most("Denials by reason", ("reason", "other_role")), 0.0);
    scene.go_on_until("the panel of alerts", |scene| scene.panel("Firing alerts", None).0 >= 1.0);
    scene.assert_panels();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn throttling_by_sts_is_reported_by_event_alert_and_panel() {
    let Some(mut scene) = Scene::begin(Situation::StsThrottling) else { return };

    scene.assert_alerts(
        &["Kube2ramStsThrottled", "Kube2ramCredentialsUnavailable"],
        &["Kube2ramRequestsFailing", "Kube2ramRequestsSlow"],
    );

    scene.assert_event("CredentialsUnavailable", &["Throttling.User", "ActionTrail"]);
    assert!(scene.most("Calls to STS by result", ("result", "throttled")) > 0.0);
    assert_eq!(scene.most("Role sessions by state", ("state", "failing")), 1.0);
    scene.assert_panels();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_api_server_that_is_away_is_reported_by_alert_and_panel_and_to_pods_by_503() {
    let Some(mut scene) = Scene::begin(Situation::ApiServerAway) else { return };

    scene.assert_alerts(
        &["Kube2ramApiWatchDown"],
        &["Kube2ramApiWatchStale", "Kube2ramRequestsFailing", "Kube2ramRequestsSlow"],
    );

    assert_eq!(scene.panel("Open watches", Some(("resource", "pods"))), (1.0, 0.0));
    assert!(scene.most("Watches that broke", ("resource", "namespaces")) > 0.0);
    assert_eq!(scene.panel("Role sessions by state", Some(("state", "fresh"))).0, 1.0, "what is known works");
    scene.assert_panels();
    // There is nobody to take an Event, and the agent does not know of whom it would be.
    assert_eq!(scene.events(), <[[String; 4]; 0]>::default());
    scene.situation.end(&mut scene.sandbox).unwrap();
    scene.until("the alert's end", |scene| {
        !scene.prometheus.firing().unwrap().contains(&"Kube2ramApiWatchDown".to_owned())
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn drift_in_the_kernel_is_reported_by_event_alert_and_panel() {
    let Some(mut scene) = Scene::begin(Situation::Drift) else { return };

    scene.assert_alerts(&["Kube2ramDatapathDrift"], &[]);

    let events = scene.events();
    let [[reason, kind, name, note]] = &events[..] else { panic!("{events:?}") };
    assert_eq!([reason, kind, name], ["DatapathRepaired", "Node", Sandbox::NODE]);
    assert!(note.contains("(detached)") && note.contains("find the process"), "{note}");
    assert!(scene.most("Drift repaired, by kind", ("kind", "detached")) > 0.0);
    assert_eq!(scene.panel("eBPF programs active", None).0, 1.0);
    scene.assert_panels();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn expired_base_credentials_are_reported_by_event_alert_and_panel() {
    let Some(mut scene) = Scene::begin(Situation::BaseCredentialsExpired) else { return };

    scene.assert_alerts(
        &["Kube2ramBaseCredentialsExpired", "Kube2ramCredentialsUnavailable"],
        &["Kube2ramRequestsFailing", "Kube2ramRequestsSlow"],
    );

    scene.assert_event(
        "CredentialsUnavailable",
        &["InvalidSecurityToken.Expired", "attach a role to the node"],
    );
    assert!(scene.panel("The agent's own credentials", None).1 <= 0.0);
    assert!(scene.most("Calls to STS by result", ("result", "base_credentials")) > 0.0);
    scene.assert_panels();
}
