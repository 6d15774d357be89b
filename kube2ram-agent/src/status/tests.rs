use std::collections::BTreeSet;

use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + seconds).unwrap()
}

fn text(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn pod(name: &str, verdict: Verdict) -> Pod {
    Pod {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        uid: "0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a".to_owned(),
        presence: "known".to_owned(),
        host_network: false,
        cgroup: text("burstable/pod0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a"),
        identified_by: text("uid"),
        listener: text("127.64.0.1:4000"),
        role: text("acs:ram::1234567890123456:role/team/orders"),
        role_from: Some(RoleFrom::Pod),
        role_annotation: text("ram.aliyuncs.com/role"),
        verdict,
        summary: "why".to_owned(),
        issued_at: Some(at(-600)),
        expires_at: Some(at(3000)),
    }
}

/// An agent of which nothing is wrong.
fn healthy() -> Status {
    let program = |name: &str, cgroup: &str| Program { name: name.to_owned(), cgroup: cgroup.to_owned() };
    let watch = |resource: &str| Watch {
        resource: resource.to_owned(),
        heard_at: Some(at(-4)),
        failing_since: None,
        lag_seconds: 0,
        failure: None,
    };
    Status {
        schema: SCHEMA,
        at: at(0),
        agent: Agent {
            version: "0.1.0".to_owned(),
            node: "node-1".to_owned(),
            pid: 4711,
            started_at: at(-93_784),
            is_draining: false,
            pending: Vec::new(),
            log_level: "info".to_owned(),
            log_level_until: None,
            taken_ports: Vec::new(),
            hints: vec!["any namespace may use any role".to_owned()],
        },
        problems: Vec::new(),
        datapath: Datapath {
            is_in_force: true,
            mode: "pods".to_owned(),
            pods_cgroup: "/sys/fs/cgroup/kubepods".to_owned(),
            checked_at: Some(at(0)),
            failures: Vec::new(),
            programs: vec![
                program("k2r_egress", "/sys/fs/cgroup/kubepods"),
                program("k2r_connect4", "/sys/fs/cgroup/kubepods"),
                program("k2r_task_conn4", "/sys/fs/cgroup"),
            ],
            repairs: [("detached".to_owned(), 2)].into(),
            last_repair: Some(Repair {
                at: at(-61),
                kind: "detached".to_owned(),
                of: "k2r_egress".to_owned(),
            }),
            outside_pods: Vec::new(),
            outcomes: [("denied_port".to_owned(), 0), ("redirected".to_owned(), 12)].into(),
            interception: Interception { arrived_at: Some(at(-3)), failure: None },
        },
        forward_guard: ForwardGuard {
            is_wanted: true,
            is_in_force: true,
            has_ipv6: true,
            has_ipvs: false,
            repairs: 0,
            failure: None,
        },
        wire_guard: WireGuard {
            is_wanted: true,
            is_in_force: true,
            node_devices: 2,
            pod_devices: 1,
            repairs: 0,
            failure: None,
        },
        boot_guard: BootGuard { state: "taken_over".to_owned(), installation_failure: None },
        api_server: ApiServer {
            address: "https://10.96.0.1:443".to_owned(),
            is_synced: true,
            restored_pods: 0,
            watches: vec![watch("pods"), watch("namespaces")],
        },
        metadata_server: MetadataServer {
            address: "100.100.100.200:80".to_owned(),
            answered_at: Some(at(-30)),
            failing_since: None,
            failed_at: None,
            failure: None,
        },
        service_accounts: ServiceAccounts {
            credentials_from: "node".to_owned(),
            own_token: "unknown".to_owned(),
            pods: [(RoleFrom::Pod, 2)].into(),
            ..ServiceAccounts::default()
        },
        base_credentials: BaseCredentials {
            source: "node_role".to_owned(),
            role: text("worker"),
            account: text("1234567890123456"),
            expires_at: Some(at(7200)),
            failed_at: None,
            failure: None,
        },
        sts: Sts {
            can_issue: true,
            is_throttled: false,
            queued: 0,
            sessions: 1,
            succeeded_at: Some(at(-600)),
            last_failure: None,
        },
        pods: vec![pod("orders", Verdict::Granted), pod("b", Verdict::Denied)],
    }
}

fn failure(kind: &str) -> StsFailure {
    StsFailure {
        at: at(-5),
        kind: kind.to_owned(),
        code: "Code".to_owned(),
        message: "words".to_owned(),
        request_id: text("id"),
        role: "acs:ram::1:role/a".to_owned(),
        remedy: "do this".to_owned(),
    }
}

#[test]
fn the_json_is_what_it_was() {
    let status = healthy();
    let json = serde_json::to_string_pretty(&status).unwrap();

    insta::assert_snapshot!("status_json", json);
    assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status);
    let explanation = explanation();
    let json = serde_json::to_string_pretty(&explanation).unwrap();
    insta::assert_snapshot!("explanation_json", json);
    assert_eq!(serde_json::from_str::<Explanation>(&json).unwrap(), explanation);
}

#[test]
fn the_text_is_aligned_and_begins_with_the_verdict() {
    insta::assert_snapshot!("status_text", healthy().to_text(Paint::Plain));
    insta::assert_snapshot!("explanation_text", explanation().to_text(Paint::Plain));
}

#[test]
fn the_report_on_an_access_key_names_the_session_and_its_pods() {
    let holder = |name: Option<&str>| Holder {
        namespace: name.map(|_| "shop".to_owned()),
        name: name.map(ToOwned::to_owned),
        uid: "0c5a".to_owned(),
        service_account: name.map(|_| "shop/web".to_owned()),
        at: at(0),
    };
    let session = IssuedSession {
        role: "acs:ram::1:role/a".to_owned(),
        session: "shop.web".to_owned(),
        grant: "service_account".to_owned(),
        request_id: None,
        node: "node-1".to_owned(),
        issued_at: Some(at(0)),
        expires_at: at(0),
        fetched_for: Some(holder(Some("web-0"))),
    };
    let report = AccessKeyReport {
        schema: SCHEMA,
        at: at(0),
        access_key_id: "STS.1\x1b".to_owned(),
        source: Some(Source::Memory),
        session: Some(session),
        pods: vec![holder(Some("web-1")), holder(None)],
        is_complete: true,
        summary: "two".to_owned(),
        remedy: text("ask"),
    };

    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(serde_json::from_value::<AccessKeyReport>(json.clone()).unwrap(), report);
    assert_eq!((&json["source"], &json["pods"][0]["name"]), (&"memory".into(), &"web-1".into()));
    let now = at(0);
    let expected = format!(
        "STS.1\u{fffd}\n\
         role              acs:ram::1:role/a\n\
         session           shop.web\n\
         grant             service_account\n\
         request id        unknown\n\
         node              node-1\n\
         issued            {now}\n\
         expires           {now}\n\
         fetched for       shop/web-0 (UID 0c5a), ServiceAccount shop/web\n\
         given to          shop/web-1 (UID 0c5a), ServiceAccount shop/web, {now}\n\
         given to          UID 0c5a, {now}\n\n\
         IN MEMORY: two\n\
         → ask\n"
    );
    assert_eq!(report.to_text(Paint::Plain), expected);
    let unknown = AccessKeyReport { session: None, source: None, ..report };
    assert_eq!(unknown.exit_code(), 66);
}

fn explanation() -> Explanation {
    Explanation {
        schema: SCHEMA,
        at: at(0),
        namespace: "shop".to_owned(),
        name: "orders".to_owned(),
        steps: vec![
            Step::new(Stage::Pod, Outcome::Passed, "is known", &[("uid", text("0c5a")), ("node", None)]),
            Step::new(Stage::Sts, Outcome::Waiting, "is slow", &[]),
            Step::new(Stage::Answer, Outcome::Failed, "the pod hears 503", &[("status", text("503"))]),
        ],
        verdict: Verdict::Unavailable,
        summary: "STS is slow".to_owned(),
        remedy: text("wait"),
    }
}

#[test]
fn colours_change_nothing_but_the_colours() {
    let (plain, painted) = (healthy().to_text(Paint::Plain), healthy().to_text(Paint::Ansi));

    assert!(!plain.contains('\x1b') && painted.contains("\x1b[32mall is well\x1b[0m"), "{painted}");
    let codes = regex::Regex::new("\x1b\\[[0-9]+m").unwrap();
    assert_eq!(codes.replace_all(&painted, ""), plain);
}

#[test]
fn what_others_wrote_cannot_move_the_terminals_cursor() {
    let mut status = healthy();
    status.datapath.failures.push("\x1b[2J\r\nall is well".to_owned());
    let mut explanation = explanation();
    explanation.summary = "\u{9b}2J\n".to_owned();

    let shown = [status.to_text(Paint::Plain), explanation.to_text(Paint::Plain)].concat();

    assert!(shown.contains("\u{fffd}[2J\u{fffd}\u{fffd}all is well"), "{shown}");
    assert!(!shown.contains(['\x1b', '\r', '\u{9b}']));
}

#[test]
fn each_fault_is_a_problem_with_a_remedy_and_health_is_none() {
    let problems = |change: &dyn Fn(&mut Status)| {
        let mut status = healthy();
        change(&mut status);
        let problems = problems_of(&status);
        assert!(problems.iter().all(|problem| !problem.remedy.is_empty()));
        problems.into_iter().map(|problem| (problem.part, problem.what)).collect::<Vec<_>>()
    };
    let one = |change: &dyn Fn(&mut Status), part: &str, word: &str| {
        let found = problems(change);
        assert!(found.len() == 1 && found[0].0 == part && found[0].1.contains(word), "{part}: {found:?}");
    };

    assert_eq!(problems(&|_| {}), []);
    assert_eq!(
        problems(&|status| status.forward_guard =
            ForwardGuard { is_wanted: false, is_in_force: false, ..status.forward_guard.clone() }),
        []
    );
    assert_eq!(problems(&|status| status.wire_guard = WireGuard::default()), [], "off");
    assert_eq!(
        problems(&|status| status.sts.last_failure = Some(failure("denied"))),
        [],
        "a role's own fault"
    );
    one(&|status| status.agent.pending.push("pods".to_owned()), "agent", "waiting for: pods");
    one(&|status| status.datapath.failures.push("a link".to_owned()), "datapath", "a link");
    let taken = |status: &mut Status| {
        status.agent.taken_ports.push(TakenPort {
            flag: "--app-port".to_owned(),
            address: "10.0.0.42:8181".to_owned(),
            holder: "process nginx (pid 7)".to_owned(),
        });
    };
    one(&taken, "agent", "cannot listen on 10.0.0.42:8181 (--app-port): process nginx (pid 7) has the port");
    let outside = |status: &mut Status| {
        let pod = |name: &str| OutsidePod {
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            uid: "u".to_owned(),
            host_network: true,
            cgroup: text("/sys/fs/cgroup/system.slice/x"),
        };
        status.datapath.outside_pods.extend([pod("orders"), pod("billing")]);
    };
    one(
        &outside,
        "datapath",
        "shop/orders (and 1 more): the pod's processes are not below the pods' cgroup (they are in /sys",
    );
    one(
        &|status| status.boot_guard.installation_failure = text("read-only"),
        "boot_guard",
        "could not be installed: read-only",
    );
    one(
        &|status| status.datapath.interception.failure = text("refused"),
        "datapath",
        "the last one arrived 3s ago",
    );
    one(&|status| status.forward_guard.is_in_force = false, "forward_guard", "not dropped");
    one(&|status| status.wire_guard.is_in_force = false, "wire_guard", "packet sockets");
    one(
        &|status| {
            let watch = &mut status.api_server.watches[1];
            (watch.failing_since, watch.failure) = (Some(at(-90)), text("refused"));
        },
        "api_server",
        "the API server https://10.96.0.1:443 does not answer (namespaces, since 1m 30s ago): refused",
    );
    let silent = |failed_at: i64| {
        move |status: &mut Status| {
            status.metadata_server.failing_since = Some(at(failed_at - 60));
            status.metadata_server.failed_at = Some(at(failed_at));
            status.metadata_server.failure = text("no route");
        }
    };
    one(
        &silent(-30),
        "metadata_server",
        "the metadata server 100.100.100.200:80 does not answer (since 1m 30s ago): no route",
    );
    assert_eq!(problems(&silent(-600)), [], "nobody asks it any more");
    one(
        &|status| status.base_credentials.failure = text("404"),
        "base_credentials",
        "the previous ones last 2h more",
    );
    one(
        &|status| {
            status.base_credentials.failure = text("404");
            status.base_credentials.expires_at = Some(at(-60));
        },
        "base_credentials",
        "the previous ones expired 1m ago",
    );
    one(&|status| status.sts.last_failure = Some(failure("base_credentials")), "base_credentials", "Code");
    one(
        &|status| status.sts.last_failure = Some(failure("unavailable")),
        "sts",
        "STS is not available: Code: words",
    );
    let throttled = |status: &mut Status| {
        status.sts.last_failure = Some(failure("throttled"));
        status.sts.is_throttled = true;
    };
    one(&throttled, "sts", "throttles");
    one(
        &|status| status.sts.last_failure = Some(failure("unexpected")),
        "sts",
        "with a code that the agent does not know: Code: words",
    );
    let without = |status: &mut Status| {
        for pod in &mut status.pods {
            (pod.verdict, pod.summary) = (Verdict::Unavailable, "STS issues no credentials".to_owned());
        }
    };
    one(&without, "sts", "(and 1 more): STS issues no credentials");
    let recovered = |status: &mut Status| {
        status.sts.last_failure = Some(failure("unavailable"));
        status.sts.succeeded_at = Some(at(-1));
    };
    assert_eq!(problems(&recovered), []);
}

/// An agent whose pods' roles are assumed by ServiceAccounts.
fn by_service_accounts() -> Status {
    let mut status = healthy();
    status.service_accounts = ServiceAccounts {
        credentials_from: "service-account".to_owned(),
        are_read: true,
        token_requester: text("node"),
        own_token: "this_node".to_owned(),
        pods: [(RoleFrom::DefaultRole, 1), (RoleFrom::Pod, 2), (RoleFrom::ServiceAccount, 3)].into(),
        ..ServiceAccounts::default()
    };
    status.base_credentials = BaseCredentials {
        source: "unused".to_owned(),
        account: text("1234567890123456"),
        ..BaseCredentials::default()
    };
    status
}

#[test]
fn each_fault_of_service_accounts_is_one_problem_with_the_remedy_of_its_requester() {
    let one = |change: &dyn Fn(&mut Status)| {
        let mut status = by_service_accounts();
        change(&mut status);
        let mut problems = problems_of(&status);
        assert!(problems.len() == 1 && problems[0].part == "service_accounts", "{problems:?}");
        problems.remove(0)
    };
    let no_token = |status: &mut Status| {
        status.service_accounts.token_failed_at = Some(at(-5));
        status.service_accounts.token_failure = text("403 Forbidden");
        // The same failure, as issuing met it.
        status.sts.last_failure = Some(failure("cluster_configuration"));
        status.sts.succeeded_at = None;
        status.pods[0].verdict = Verdict::Unavailable;
    };
    let unread = |status: &mut Status| {
        status.service_accounts.read_failed_at = Some(at(-5));
        status.service_accounts.read_failure = text("403 Forbidden");
        status.pods[0].verdict = Verdict::Unavailable;
    };
    let as_agent = |status: &mut Status| status.service_accounts.token_requester = text("agent");

    assert_eq!(problems_of(&by_service_accounts()), []);
    let problem = one(&no_token);
    assert!(
        problem.what.contains("no tokens of ServiceAccounts (last 5s ago): 403 Forbidden"),
        "{problem:?}"
    );
    for object in ["impersonate:associated-node", "impersonate-on:associated-node:create", "1.36"] {
        assert!(problem.remedy.contains(object), "{problem:?}");
    }
    let problem = one(&|status| {
        no_token(status);
        as_agent(status);
    });
    assert!(problem.remedy.contains("may create serviceaccounts/token"), "{problem:?}");
    assert!(!problem.remedy.contains("impersonate"), "{problem:?}");

    assert!(one(&unread).remedy.contains("impersonate-on:associated-node:get"));
    let problem = one(&|status| {
        unread(status);
        as_agent(status);
    });
    assert!(problem.what.contains("cannot be read (5s ago): 403"), "{problem:?}");
    assert!(problem.remedy.contains("may get serviceaccounts"), "{problem:?}");
    let problem = one(&|status| {
        unread(status);
        status.service_accounts.token_requester = None;
    });
    assert!(problem.remedy.contains("may get serviceaccounts"), "{problem:?}");

    let problem = one(&|status| status.service_accounts.own_token = "no_node".to_owned());
    assert!(problem.remedy.contains("--token-requests-as=agent"), "{problem:?}");
    let problem = one(&|status| {
        status.service_accounts.own_token = "other_node".to_owned();
        status.service_accounts.own_token_node = text("node-2");
    });
    assert!(problem.what.contains("bound to node node-2, and the agent runs as node-1"), "{problem:?}");
    let problem = one(&|status| {
        status.sts.last_failure = Some(failure("cluster_configuration"));
        status.sts.succeeded_at = None;
    });
    assert!(problem.what.contains("the cluster's configuration: Code: words"), "{problem:?}");
    assert_eq!(problem.remedy, "do this");
}

#[test]
fn what_is_no_fault_of_service_accounts_is_no_problem() {
    let mut status = by_service_accounts();
    status.service_accounts.token_requester = text("agent");
    status.service_accounts.own_token = "no_node".to_owned();
    assert_eq!(problems_of(&status), [], "as itself, the agent needs no bound token");
    status.service_accounts.token_failed_at = Some(at(-600));
    status.service_accounts.token_failure = text("404");
    assert_eq!(problems_of(&status), [], "an old failure");

    let mut status = healthy();
    status.service_accounts.own_token = "other_node".to_owned();
    assert_eq!(problems_of(&status), [], "nothing asks for tokens");
    let mut recovered = by_service_accounts();
    recovered.sts.last_failure = Some(failure("cluster_configuration"));
    recovered.sts.succeeded_at = Some(at(-1));
    assert_eq!(problems_of(&recovered), []);
}

#[test]
fn the_text_has_the_way_to_roles_and_what_fails_of_it() {
    assert!(!healthy().to_text(Paint::Plain).contains("ServiceAccounts"));
    let mut status = by_service_accounts();

    let shown = status.to_text(Paint::Plain);

    for line in [
        "ServiceAccounts   roles are assumed by their tokens, which the agent asks for as its node\n",
        "                  the agent's own token is bound to this node\n",
        "                  pods with a role: 1 by default, 2 by their own annotation, 3 by their ServiceAccount\n",
        "base credentials  not used: the agent signs nothing, account 1234567890123456\n",
    ] {
        assert!(shown.contains(line), "{line}{shown}");
    }
    status.service_accounts.token_failed_at = Some(at(-60));
    status.service_accounts.token_failure = text("403");
    assert!(status.to_text(Paint::Plain).contains("✗ no token, 1m ago: 403\n"));
    status.service_accounts.token_requester = None;
    let shown = status.to_text(Paint::Plain);
    assert!(
        shown.contains("their annotations are read; roles are assumed by the agent's own right"),
        "{shown}"
    );
    assert!(!shown.contains("the agent's own token"), "{shown}");
}

#[test]
fn documents_of_older_agents_are_read() {
    let mut json = serde_json::to_value(healthy()).unwrap();
    json.as_object_mut().unwrap().remove("service_accounts").unwrap();
    for pod in json["pods"].as_array_mut().unwrap() {
        pod.as_object_mut().unwrap().retain(|key, _| !key.starts_with("role_"));
    }

    let status: Status = serde_json::from_value(json).unwrap();

    assert_eq!(status.service_accounts, ServiceAccounts::default());
    assert!(!status.to_text(Paint::Plain).contains("ServiceAccounts"));
    let by_accounts = by_service_accounts();
    let json = serde_json::to_string(&by_accounts).unwrap();
    assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), by_accounts);
}

#[test]
fn what_fails_is_named_with_its_address_once_and_since_when() {
    let mut status = healthy();
    let watch = &mut status.api_server.watches[0];
    (watch.heard_at, watch.failing_since, watch.failure) = (None, Some(at(-90)), text("refused"));
    let server = &mut status.metadata_server;
    (server.failing_since, server.failed_at, server.failure) =
        (Some(at(-60)), Some(at(-1)), text("no route"));

    let text = status.to_text(Paint::Plain);

    assert_eq!(text.matches("https://10.96.0.1:443").count(), 1, "{text}");
    assert!(text.contains("  pods: never answered; ✗ fails since 1m 30s ago: refused\n"), "{text}");
    let line = "metadata server   100.100.100.200:80: answered 30s ago; ✗ fails since 1m ago: no route\n";
    assert!(text.contains(line), "{text}");
    assert!(!text.contains("lag"), "{text}");
}

#[test]
fn exit_codes_are_those_of_the_help() {
    let mut status = healthy();
    assert_eq!(status.exit_code(), 0);
    status.problems.push(Problem { part: "sts".into(), what: "it".into(), remedy: "wait".into() });
    assert_eq!(status.exit_code(), 1);

    let code = |verdict| Explanation { verdict, ..explanation() }.exit_code();
    assert_eq!([Verdict::Granted, Verdict::NodeRole, Verdict::Pending].map(code), [0; 3]);
    assert_eq!([Verdict::Denied, Verdict::NoRole, Verdict::Unavailable].map(code), [1; 3]);
    assert_eq!(code(Verdict::Unknown), 66);
}

#[test]
fn spans_have_their_two_largest_units() {
    let shown = |seconds| text::span(jiff::SignedDuration::from_secs(seconds));

    let spans = [0, 59, 60, 3_599, 3_600, 3_660, 86_400, 90_061, -5].map(shown);

    assert_eq!(spans, ["0s", "59s", "1m", "59m 59s", "1h", "1h 1m", "1d", "1d 1h", "0s"]);
    let units: BTreeSet<_> = spans.iter().filter_map(|span| span.chars().last()).collect();
    assert_eq!(units, ['d', 'h', 'm', 's'].into());
}
