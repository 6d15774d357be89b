use super::{
    super::{
        account_api::Refusal,
        object::{PodUpdate, testing::pod_update},
    },
    *,
};

const AT: Timestamp = Timestamp::UNIX_EPOCH;

/// A pod of the account `name`.
fn pod(n: u8, name: &str) -> Known {
    let PodUpdate::Live(mut known) = pod_update(n, "p") else { unreachable!() };
    Arc::make_mut(&mut known.pod).service_account = name.into();
    known
}

fn mirror(n: u8) -> Known {
    let mut known = pod(n, "default");
    Arc::make_mut(&mut known.pod).is_mirror = true;
    known.config_hash = PodUid::parse("0123456789abcdef0123456789abcdef");
    known
}

fn account(name: &str) -> ServiceAccount {
    ServiceAccount { namespace: "n".into(), name: name.into() }
}

fn annotations(role: &str) -> Annotations {
    [("role".into(), role.into())].into()
}

fn refusal(code: u16, retry_after: Option<Duration>) -> Refusal {
    Refusal { code, reason: "".into(), kind: "".into(), message: "no".into(), retry_after }
}

fn refused(code: u16, retry_after: Option<Duration>) -> CallError {
    CallError::Refused(Box::new(refusal(code, retry_after)))
}

fn follow(accounts: &mut Accounts, pods: &[Known], departed: &[Known], now: Instant) {
    accounts.follow(pods.iter(), departed.iter(), now);
}

/// Reads all that is due. Returns the names.
fn read_due(accounts: &mut Accounts, now: Instant) -> Vec<Box<str>> {
    let due: Vec<_> = std::iter::from_fn(|| accounts.start(now)).collect();
    due.iter().for_each(|name| accounts.finish(name, Ok(annotations("r")), (now, AT), 0.5));
    let mut names: Vec<_> = due.into_iter().map(|name| name.name).collect();
    names.sort();
    names
}

#[test]
fn each_account_is_read_once_for_all_its_pods_and_again_about_when_credentials_are_renewed() {
    let (mut accounts, start) = (Accounts::default(), Instant::now());
    let pods = [pod(1, "a"), pod(2, "a"), pod(3, "b")];

    follow(&mut accounts, &pods, &[], start);
    assert_eq!(read_due(&mut accounts, start), [Box::from("a"), Box::from("b")]);
    follow(&mut accounts, &pods, &[], start);

    assert_eq!(accounts.next_due(), Some(start + INTERVAL));
    assert!(read_due(&mut accounts, start + INTERVAL - Duration::from_secs(1)).is_empty());
    assert_eq!(read_due(&mut accounts, start + INTERVAL).len(), 2);
}

#[test]
fn reads_are_spread() {
    let start = Instant::now();
    for (jitter, minutes) in [(0.0, 23.4), (1.0, 28.6)] {
        let mut accounts = Accounts::default();
        follow(&mut accounts, &[pod(1, "a")], &[], start);
        let name = accounts.start(start).unwrap();
        accounts.finish(&name, Ok(annotations("r")), (start, AT), jitter);

        let pause = accounts.next_due().unwrap() - start;
        assert!((pause.as_secs_f64() / 60.0 - minutes).abs() < 0.01, "{pause:?}");
    }
}

#[test]
fn a_new_pod_has_its_account_read_again_unless_it_was_just_read() {
    let (mut accounts, start) = (Accounts::default(), Instant::now());
    let pods = [pod(1, "a"), pod(2, "a"), pod(3, "a")];
    follow(&mut accounts, &pods[..1], &[], start);
    assert_eq!(read_due(&mut accounts, start).len(), 1);

    let soon = start + Duration::from_secs(1);
    follow(&mut accounts, &pods[..2], &[], soon);
    assert!(read_due(&mut accounts, soon).is_empty());
    assert_eq!(accounts.next_due(), Some(start + FRESH_FOR), "one new pod is enough");
    assert_eq!(read_due(&mut accounts, start + FRESH_FOR).len(), 1);
    let later = start + FRESH_FOR * 3;
    follow(&mut accounts, &pods[..2], &[], later);
    assert!(read_due(&mut accounts, later).is_empty(), "no pod is new");
    follow(&mut accounts, &pods, &[], later);

    assert_eq!(read_due(&mut accounts, later).len(), 1);
}

#[test]
fn a_pod_that_appears_during_a_read_has_the_account_read_again() {
    let (mut accounts, start) = (Accounts::default(), Instant::now());
    follow(&mut accounts, &[pod(1, "a")], &[], start);
    let name = accounts.start(start).unwrap();
    let second = Duration::from_secs(1);

    follow(&mut accounts, &[pod(1, "a"), pod(2, "a")], &[], start + second);
    accounts.finish(&name, Ok(annotations("old")), (start + 2 * second, AT), 0.5);

    assert_eq!(accounts.next_due(), Some(start + FRESH_FOR), "from the start of the read on");
    assert_eq!(read_due(&mut accounts, start + FRESH_FOR).len(), 1);
    assert_eq!(accounts.next_due(), Some(start + FRESH_FOR + INTERVAL), "once");
}

#[test]
fn a_pod_that_appears_during_a_read_does_not_shorten_the_pause_after_its_failure() {
    let (mut accounts, start) = (Accounts::default(), Instant::now());
    follow(&mut accounts, &[pod(1, "a")], &[], start);
    let name = accounts.start(start).unwrap();

    follow(&mut accounts, &[pod(1, "a"), pod(2, "a")], &[], start);
    accounts.finish(&name, Err(refused(500, None)), (start, AT), 1.0);
    let again = accounts.next_due().unwrap();
    assert_eq!(again, start + BACK_OFF);
    assert_eq!(read_due(&mut accounts, again).len(), 1);

    assert_eq!(accounts.next_due(), Some(again + INTERVAL), "that read is later than the pod");
}

#[test]
fn an_account_that_was_deleted_keeps_its_annotations_and_is_asked_for_within_a_minute() {
    let (mut accounts, mut now) = (Accounts::default(), Instant::now());
    let pods = [pod(1, "a"), pod(2, "b")];
    let absent = || CallError::Refused(Box::new(Refusal { reason: "NotFound".into(), ..refusal(404, None) }));
    follow(&mut accounts, &pods, &[], now);
    let names: Vec<_> = std::iter::from_fn(|| accounts.start(now)).collect();
    assert_eq!(names.len(), 2);
    accounts.finish(&account("a"), Ok(annotations("r")), (now, AT), 0.5);
    accounts.finish(&account("b"), Err(absent()), (now, AT), 0.5);

    for n in 0..20 {
        accounts.finish(&account("a"), Err(absent()), (now, AT), 1.0);
        accounts.finish(&account("b"), Err(absent()), (now, AT), 1.0);
        let due = accounts.next_due().unwrap();
        assert!(due <= now + BACK_OFF_LIMIT, "{n}");
        now = due;
    }

    let (mut known, mut unknown) = (pod(3, "a"), pod(4, "b"));
    assert!(accounts.fill(&mut known), "also for a new pod");
    assert_eq!(known.pod.account_annotations, Some(annotations("r").into()));
    assert!(!accounts.fill(&mut unknown) && unknown.pod.account_annotations.is_none());
    assert!(accounts.error_of(&unknown.pod).is_some(), "it waits, and the reason is known");
    assert!(accounts.failure().is_none(), "no fault of the cluster");
}

#[test]
fn namespaces_take_turns() {
    let (mut accounts, start) = (Accounts::default(), Instant::now());
    let of = |n: u8, namespace: &str| {
        let mut known = pod(n, &format!("a{n}"));
        Arc::make_mut(&mut known.pod).namespace = namespace.into();
        known
    };
    let mut pods: Vec<_> = (1..=100).map(|n| of(n, "many")).collect();
    follow(&mut accounts, &pods, &[], start);
    let later = start + Duration::from_secs(1);
    pods.extend([of(101, "few"), of(102, "other")]);
    follow(&mut accounts, &pods, &[], later);

    let first: Vec<_> = (0..4).map(|_| accounts.start(later).unwrap()).collect();

    let of_namespace = |namespace: &str| first.iter().filter(|name| &*name.namespace == namespace).count();
    assert_eq!(["few", "other", "many"].map(of_namespace), [1, 1, 2]);
    let mut others = vec![of(103, "few"), of(104, "few"), of(105, "many")];
    others.append(&mut pods);
    follow(&mut accounts, &others, &[], later);
    let next: Vec<_> = (0..2).map(|_| accounts.start(later).unwrap().namespace).collect();
    assert!(next.contains(&"few".into()), "{next:?}");

    follow(&mut accounts, &[], &[], later);
    let names: Vec<_> = accounts.known.keys().cloned().collect();
    names.iter().for_each(|name| accounts.finish(name, Ok(annotations("r")), (later, AT), 0.5));
    follow(&mut accounts, &[], &[], later);
    assert!(accounts.turns.is_empty(), "bounded by the accounts");
}

#[test]
fn an_account_is_forgotten_with_its_last_pod_and_not_read_for_departed_ones() {
    let (mut accounts, start) = (Accounts::default(), Instant::now());
    follow(&mut accounts, &[pod(1, "a")], &[], start);
    assert_eq!(read_due(&mut accounts, start).len(), 1);

    follow(&mut accounts, &[], &[pod(1, "a")], start);
    assert_eq!(accounts.next_due(), None);
    let mut departed = pod(1, "a");
    assert!(accounts.fill(&mut departed), "it keeps its role");
    follow(&mut accounts, &[], &[], start);

    assert!(accounts.known.is_empty());
    assert!(!accounts.fill(&mut pod(2, "a")), "nothing is known any more");
}

#[test]
fn a_read_under_way_is_not_started_again_even_if_its_pods_go_and_come() {
    let (mut accounts, now) = (Accounts::default(), Instant::now());
    follow(&mut accounts, &[pod(1, "a")], &[], now);
    let name = accounts.start(now).unwrap();

    follow(&mut accounts, &[], &[], now);
    follow(&mut accounts, &[pod(2, "a")], &[], now);
    assert_eq!((accounts.start(now), accounts.next_due()), (None, None));
    accounts.finish(&name, Ok(annotations("r")), (now, AT), 0.5);

    assert!(accounts.fill(&mut pod(2, "a")));
    accounts.finish(&account("other"), Ok(annotations("r")), (now, AT), 0.5);
    assert_eq!(accounts.known.len(), 1);
}

#[test]
fn a_pod_becomes_another_object_only_when_its_accounts_annotations_change() {
    let (mut accounts, now) = (Accounts::default(), Instant::now());
    let mut known = pod(1, "a");
    let bare = Arc::clone(&known.pod);
    follow(&mut accounts, std::slice::from_ref(&known), &[], now);
    assert!(!accounts.fill(&mut known) && Arc::ptr_eq(&known.pod, &bare), "not read yet");

    let set = |accounts: &mut Accounts, role| {
        accounts.finish(&account("a"), Ok(annotations(role)), (now, AT), 0.5);
    };
    set(&mut accounts, "one");
    assert!(accounts.fill(&mut known));
    let first = Arc::clone(&known.pod);
    assert!(!Arc::ptr_eq(&first, &bare) && bare.account_annotations.is_none());

    set(&mut accounts, "one");
    assert!(!accounts.fill(&mut known) && Arc::ptr_eq(&known.pod, &first));
    accounts.finish(&account("a"), Err(refused(500, None)), (now, AT), 0.5);
    assert!(!accounts.fill(&mut known) && Arc::ptr_eq(&known.pod, &first), "a failure changes nothing");
    set(&mut accounts, "two");
    assert!(accounts.fill(&mut known) && !Arc::ptr_eq(&known.pod, &first));
    assert_eq!(known.pod.account_annotations, Some(annotations("two").into()));
}

#[test]
fn a_static_pods_mirror_has_no_account_and_waits_for_none() {
    let (mut accounts, now) = (Accounts::default(), Instant::now());
    let mut known = mirror(1);

    follow(&mut accounts, std::slice::from_ref(&known), &[], now);

    assert_eq!(accounts.start(now), None);
    assert!(accounts.fill(&mut known));
    assert_eq!(known.pod.account_annotations, Some(Arc::default()));
}

#[test]
fn what_was_known_before_a_restart_counts_until_the_account_is_read() {
    let (mut accounts, now) = (Accounts::default(), Instant::now());
    let mut saved = pod(1, "a");
    Arc::make_mut(&mut saved.pod).account_annotations = Some(annotations("saved").into());
    accounts.restore(&saved);
    accounts.restore(&pod(2, "b"));

    let mut listed = pod(1, "a");
    assert!(accounts.fill(&mut listed));
    assert_eq!(listed.pod.account_annotations, Some(annotations("saved").into()));
    assert!(!accounts.fill(&mut pod(2, "b")));

    let soon = now + Duration::from_secs(1);
    follow(&mut accounts, &[listed.clone(), pod(2, "b")], &[], soon);
    assert_eq!(read_due(&mut accounts, soon).len(), 2, "both are read all the same");
    assert!(accounts.fill(&mut listed));
    accounts.restore(&saved);
    assert!(!accounts.fill(&mut listed), "what was read stays");
}

#[test]
fn failures_make_reads_rarer_and_are_reported_from_the_second_on() {
    let (mut accounts, mut now) = (Accounts::default(), Instant::now());
    let pods = [pod(1, "a"), pod(2, "b")];
    follow(&mut accounts, &pods, &[], now);
    assert_eq!(read_due(&mut accounts, now).len(), 2);
    now += INTERVAL;
    let mut pauses = Vec::new();
    for n in 1..=8 {
        let name = std::iter::from_fn(|| accounts.start(now)).find(|it| *it == account("a")).unwrap();
        accounts.finish(&account("b"), Ok(annotations("r")), (now, AT), 0.5);
        accounts.finish(&name, Err(refused(500, None)), (now, AT), 1.0);
        assert_eq!(accounts.failure().is_some(), n >= 2);
        let due = accounts.next_due().unwrap();
        pauses.push((due - now).as_secs());
        now = due;
    }

    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
    assert!(accounts.error_of(&pods[0].pod).is_some() && accounts.error_of(&pods[1].pod).is_none());
    // A new pod does not shorten the pause.
    follow(&mut accounts, &[pod(1, "a"), pod(3, "a")], &[], now - Duration::from_secs(1));
    assert_eq!(accounts.start(now - Duration::from_secs(1)), None);
    assert_eq!(accounts.start(now), Some(account("a")));
    accounts.finish(&account("a"), Ok(annotations("r")), (now, AT), 0.5);
    assert!(accounts.failure().is_none() && accounts.error_of(&pods[0].pod).is_none());
}

#[test]
fn waits_as_long_as_the_kind_of_failure_requires() {
    let secs = |error: CallError, failures| pause(&error, failures, 0.0).as_secs();

    // The first may be the Node authorizer's, which has not seen the pod yet.
    assert_eq!(secs(refused(403, None), 1), 1);
    assert_eq!(secs(refused(403, None), 2), 30);
    assert_eq!(secs(refused(403, None), 20), 30);
    // It will, whatever number of reads that takes.
    let unrelated = || {
        let message = "User \"system:node:n\" cannot get resource: no relationship found between node 'n' and this object";
        CallError::Refused(Box::new(Refusal { message: message.into(), ..refusal(403, None) }))
    };
    assert_eq!([1, 2, 3, 4].map(|failures| secs(unrelated(), failures)), [1, 1, 2, 4]);
    assert_eq!(secs(refused(429, Some(Duration::from_secs(7))), 1), 7);
    assert_eq!(secs(CallError::Unreadable, 1), 1);
    assert_eq!(secs(CallError::Unreadable, u32::MAX), 30);
    assert_eq!(pause(&CallError::Unreadable, u32::MAX, 1.0), BACK_OFF_LIMIT);
}

#[test]
fn the_account_that_waits_longest_is_read_first() {
    let (mut accounts, start) = (Accounts::default(), Instant::now());
    follow(&mut accounts, &[pod(1, "late")], &[], start + Duration::from_secs(1));
    let pods = [pod(1, "late"), pod(2, "early")];
    follow(&mut accounts, &pods, &[], start);

    assert_eq!(accounts.start(start), Some(account("early")));
    assert_eq!(accounts.start(start), None);
    assert_eq!(accounts.start(start + Duration::from_secs(1)), Some(account("late")));
}
