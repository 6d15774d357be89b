use std::{path::Path, time::Duration};

use secrecy::ExposeSecret;
use tracing::level_filters::LevelFilter;

use super::*;
use crate::{
    policy::PatternFormat,
    role::{Attribution, SessionTags},
    server::{HostNetworkPods, MetadataPolicy},
};
use kube2ram_cloud::{
    Endpoint, StsEndpoint,
    role::{ArnStyle, BaseArn},
};
use kube2ram_service::telemetry::LogFormat;

mod reference;

/// Parses `flags` (split at blanks) in an environment of `variables`.
fn parse(flags: &str, variables: &[(&str, &str)]) -> Result<Config, ArgsError> {
    let env = |name: &str| {
        variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| OsString::from(value))
    };
    match command(flags, &env)? {
        Command::Agent(config) => Ok(*config),
        other => panic!("{flags}: {other:?}"),
    }
}

fn command(flags: &str, env: &dyn Fn(&str) -> Option<OsString>) -> Result<Command, ArgsError> {
    Command::from_args(["kube2ram"].into_iter().chain(flags.split_whitespace()).map(OsString::from), env)
}

#[test]
fn a_misspelt_variable_is_refused_and_service_links_are_not() {
    let refused = |name: &str, value: &str| {
        refuse_unknown([("PATH", "/bin"), ("HOST_IP", "x"), (name, value)].map(|(n, v)| (n.into(), v.into())))
    };

    for (name, hint) in [
        ("KUBE2RAM_NAMESPACE_RESTRICTION", ": it may be meant for KUBE2RAM_NAMESPACE_RESTRICTIONS"),
        ("KUBE2RAM_HOST_NETWORK_POD", ": it may be meant for KUBE2RAM_HOST_NETWORK_PODS"),
        ("KUBE2RAM_SOMETHING_ELSE_ALTOGETHER", ""),
        ("KUBE2RAM_SERVICE_HOSTS", ""),
        ("KUBE2RAM_METRICS_PORT_X", ": it may be meant for KUBE2RAM_METRICS_PORT"),
        ("KUBE2RAM_", ""),
    ] {
        let Err(ArgsError::Usage(line)) = refused(name, "true") else { panic!("{name} is taken") };
        assert_eq!(line, format!("the variable {name} stands for no flag{hint}"));
    }
    for (name, value) in [
        ("KUBE2RAM_NAMESPACE_RESTRICTIONS", "true"),
        ("KUBE2RAM_VERBOSE", "true"),
        ("KUBE2RAM_SOMETHING", ""),
        ("KUBE2RAMX", "1"),
        // As the kubelet sets them for a Service kube2ram, and for kube2ram-metrics.
        ("KUBE2RAM_SERVICE_HOST", "10.0.0.1"),
        ("KUBE2RAM_SERVICE_PORT", "80"),
        ("KUBE2RAM_SERVICE_PORT_HTTP", "80"),
        ("KUBE2RAM_PORT", "tcp://10.0.0.1:80"),
        ("KUBE2RAM_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("KUBE2RAM_PORT_80_TCP_PROTO", "tcp"),
        ("KUBE2RAM_PORT_80_TCP_PORT", "80"),
        ("KUBE2RAM_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("KUBE2RAM_METRICS_SERVICE_HOST", "10.0.0.1"),
        ("KUBE2RAM_METRICS_SERVICE_PORT_HTTP", "80"),
        ("KUBE2RAM_METRICS_PORT_53_UDP_ADDR", "10.0.0.1"),
    ] {
        assert!(refused(name, value).is_ok(), "{name}={value}");
    }
}

#[test]
fn uninstall_needs_nothing_but_knows_the_pins() {
    let bpf_dir = |flags: &str, env: &dyn Fn(&str) -> Option<OsString>| match command(flags, env).unwrap() {
        Command::Uninstall { bpf_dir, state_dir } => {
            assert_eq!(state_dir, PathBuf::from("/run/kube2ram"));
            bpf_dir
        }
        other => panic!("{flags}: {other:?}"),
    };
    let variable = |name: &str| (name == "KUBE2RAM_BPF_DIR").then(|| OsString::from("/b"));

    assert_eq!(bpf_dir("uninstall", &|_| None), PathBuf::from("/sys/fs/bpf/kube2ram"));
    assert_eq!(bpf_dir("uninstall --bpf-dir=/a", &variable), PathBuf::from("/a"));
    assert_eq!(bpf_dir("--bpf-dir=/a uninstall", &|_| None), PathBuf::from("/a"));
    assert_eq!(bpf_dir("uninstall", &variable), PathBuf::from("/b"));
}

#[test]
fn the_boot_guard_takes_what_the_agent_takes() {
    let guard = |flags: &str, env: &dyn Fn(&str) -> Option<OsString>| match command(flags, env).unwrap() {
        Command::BootGuard(BootGuardCommand::Apply(guard)) => guard,
        other => panic!("{flags}: {other:?}"),
    };
    let variable = |name: &str| (name == "KUBE2RAM_METADATA_ADDR").then(|| OsString::from("10.9.8.7:8080"));

    let defaults = guard("boot-guard apply", &|_| None);
    let other =
        guard("boot-guard apply --forward-guard=off --host-cgroup=a.slice --host-cgroup b/c", &variable);

    assert_eq!(
        defaults.host_cgroups,
        ["init.scope", "runtime.slice", "system.slice", "user.slice"].map(PathBuf::from)
    );
    assert!(defaults.forward_guard);
    assert_eq!(defaults.metadata.to_string(), "100.100.100.200:80 and [fd00:100::100:200]:80");
    assert_eq!(other.host_cgroups, ["a.slice", "b/c"].map(PathBuf::from));
    assert!(!other.forward_guard);
    assert_eq!(other.metadata.to_string(), "10.9.8.7:8080 and [fd00:100::100:200]:8080");
}

#[test]
fn the_boot_guard_is_installed_and_removed_on_a_host() {
    let host_root = |flags: &str| match command(flags, &|_| None).unwrap() {
        Command::BootGuard(BootGuardCommand::Install(Installation {
            host_root,
            required_by_kubelet,
            ..
        })) => (host_root, Some(required_by_kubelet)),
        Command::BootGuard(BootGuardCommand::Remove { host_root }) => (host_root, None),
        other => panic!("{flags}: {other:?}"),
    };

    assert_eq!(host_root("boot-guard install"), ("/".into(), Some(false)));
    assert_eq!(
        host_root("boot-guard install --host-root=/host --required-by-kubelet"),
        ("/host".into(), Some(true))
    );
    assert_eq!(host_root("boot-guard remove --host-root=/host"), ("/host".into(), None));
}

#[test]
fn probes_ask_the_agent_of_the_pods_directory_or_the_state_directorys() {
    for probe in ["live", "ready"] {
        // The flags of earlier manifests' probes still parse.
        let line = format!("{probe} --pod-dir=/p --state-dir=/s --cgroup-root=/c");
        let told = match command(&line, &|_| None).unwrap() {
            Command::Live(paths) | Command::Ready(paths) => paths,
            other => panic!("{other:?}"),
        };

        assert_eq!(told, SocketPaths::new(Path::new("/p"), Path::new("/s")));
        assert_ne!(told, SocketPaths::new(Path::new("/s"), Path::new("/p")));
    }
}

#[test]
fn operators_ask_the_agent_of_the_state_directory() {
    match command("explain shop/orders -o json --state-dir=/s", &|_| None).unwrap() {
        Command::Explain { namespace, name, output, state_dir } => {
            assert_eq!((namespace.as_str(), name.as_str()), ("shop", "orders"));
            assert_eq!((output, state_dir), (Output::Json, "/s".into()));
        }
        other => panic!("{other:?}"),
    }
    let status = command("status", &|_| None).unwrap();
    assert!(matches!(status, Command::Status { output: Output::Text, .. }), "{status:?}");
    for pod in
        ["orders", "shop/", "/orders", "Shop/orders", "shop/orders/x", "shop/o,metadata.name=x", "../x"]
    {
        let refused = command(&format!("explain {pod}"), &|_| None).unwrap_err().to_string();
        assert!(refused.contains("give <namespace>/<pod>"), "{pod}: {refused}");
    }
}

#[test]
fn explain_takes_a_pod_or_an_access_key() {
    match command("explain --access-key-id STS.NUgYbaeEx-1_2 -o json --state-dir=/s", &|_| None).unwrap() {
        Command::ExplainAccessKey { access_key_id, output, state_dir } => {
            assert_eq!(access_key_id, "STS.NUgYbaeEx-1_2");
            assert_eq!((output, state_dir), (Output::Json, "/s".into()));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(command("explain shop/orders", &|_| None).unwrap(), Command::Explain { .. }));
    for flags in ["", " shop/orders --access-key-id=STS.1234"] {
        assert!(command(&format!("explain{flags}"), &|_| None).is_err(), "{flags}");
    }
    for id in ["", "STS", "STS.1/2", "STS.1\"2", &"x".repeat(129)] {
        let refused = command(&format!("explain --access-key-id={id}"), &|_| None).unwrap_err().to_string();
        assert!(refused.contains("access-key-id"), "{id}: {refused}");
    }
}

#[test]
fn the_log_changes_for_a_while() {
    let change = |flags: &str| match command(flags, &|_| None).unwrap() {
        Command::LogLevel { change, .. } => change,
        other => panic!("{flags}: {other:?}"),
    };
    let to = |level: &str, seconds| Some(ChangeLogLevel::To { level: level.to_owned(), seconds });

    assert_eq!(change("log-level"), None);
    assert_eq!(change("log-level reset"), Some(ChangeLogLevel::Reset));
    assert_eq!(change("log-level debug"), to("debug", 600));
    assert_eq!(change("log-level warn --for 1h30m"), to("warn", 5400));
    assert!(command("log-level loud", &|_| None).unwrap_err().to_string().contains("error or reset"));
}

/// Parses `flags` on a node that is called `n`.
fn config(flags: &str) -> Result<Config, ArgsError> {
    parse(flags, &[("NODE_NAME", "n")])
}

/// The one line that refuses `flags`.
fn refusal(flags: &str) -> String {
    let error = config(flags).expect_err(flags);

    assert_eq!(error.exit_code(), 64, "{flags}");
    let line = error.to_string();
    assert!(!line.is_empty() && !line.contains('\n'), "{line:?}");
    line
}

fn base(text: &str) -> Source<BaseArn> {
    Source::Given(BaseArn::parse(text).unwrap())
}

#[test]
fn takes_the_predecessors_manifest_as_it_stands() {
    let flags = "--app-port=8181 --iptables=true --host-ip=10.0.0.42 --host-interface=cni0 --verbose \
                 --auto-discover-default-role";

    let config = parse(flags, &[("HOST_IP", "10.0.0.42"), ("NODE_NAME", "cn-hangzhou.10.0.0.42")]).unwrap();

    assert_eq!(config.app_port, 8181);
    assert_eq!(config.metrics_port, 9181);
    assert_eq!(config.host_ip, Some("10.0.0.42".parse().unwrap()));
    assert_eq!(config.node, "cn-hangzhou.10.0.0.42");
    assert_eq!(config.log_level, LevelFilter::DEBUG);
    assert_eq!((config.base_arn, config.default_role), (Source::Discover, Source::Discover));
    assert_eq!(
        config.notices,
        [
            "--host-interface has no effect: pods are recognised by their cgroup, whatever interface they use",
            "--iptables has no effect: connections are redirected by eBPF programs, without iptables rules",
        ]
    );
}

#[test]
fn a_proxy_that_others_would_use_is_reported_as_ignored() {
    let with = |variables: &[(&str, &str)]| {
        let variables: Vec<_> = [("NODE_NAME", "n")].into_iter().chain(variables.iter().copied()).collect();
        parse("", &variables).unwrap().notices
    };

    let notices = with(&[("https_proxy", "http://proxy:3128"), ("HTTP_PROXY", "http://proxy:3128")]);

    assert_eq!(notices.len(), 1);
    assert!(notices[0].starts_with("https_proxy, HTTP_PROXY has no effect: "), "{notices:?}");
    assert!(!notices[0].contains("3128"), "a proxy's address may hold a password");
    assert!(with(&[("NO_PROXY", "10.0.0.0/8"), ("HTTPS_PROXY", "")]).is_empty());
}

/// The arguments of the DaemonSets that the predecessors publish, and what a cluster's administrator would
/// have put into them.
#[test]
fn takes_the_published_manifests_of_both_predecessors() {
    let variables = [("HOST_IP", "10.0.0.42"), ("NODE_NAME", "cn-hangzhou.10.0.0.42")];
    // Go kube2ram: kustomize/daemonset.yaml and examples/ack-example.yml at 5ac394c.
    let kube2ram = "--app-port=8181 --iptables=true --host-ip=10.0.0.42 --host-interface=cni0 --verbose --auto-discover-default-role";
    // kube2iam: kustomize/base/daemonset.yaml at 2e3cbd5.
    let kube2iam = "--host-ip=10.0.0.42 --iptables=true --node=cn-hangzhou.10.0.0.42";
    // kube2iam: charts/kube2iam/templates/daemonset.yaml at 39fc48d, with extraArgs for Alibaba Cloud and
    // another metrics port.
    let chart = "--host-interface=cali+ --node=cn-hangzhou.10.0.0.42 --host-ip=10.0.0.42 --iptables=true \
                 --base-role-arn=acs:ram::123456789012:role/ --iam-role-key=iam.amazonaws.com/role \
                 --iam-external-id=iam.amazonaws.com/external-id --iam-role-session-ttl=15m --iam-role-error-ttl=1m \
                 --namespace-restrictions --namespace-restriction-format=regexp --namespace-key=iam.amazonaws.com/allowed-roles \
                 --cache-resync-period=30m --resolve-duplicate-cache-ips --backoff-max-interval=1s --backoff-max-elapsed-time=2s \
                 --use-regional-sts-endpoint --log-format=json --log-level=info --verbose --app-port=8181 --metrics-port=9543";

    for (manifest, notices) in [(kube2ram, 2), (kube2iam, 1), (chart, 7)] {
        let config = parse(manifest, &variables).unwrap();

        assert_eq!(config.app_port, 8181, "{manifest}");
        assert_eq!(config.node, "cn-hangzhou.10.0.0.42");
        assert_eq!(config.host_ip, Some("10.0.0.42".parse().unwrap()));
        assert_eq!(config.notices.len(), notices, "{:?}", config.notices);
    }
    let config = parse(chart, &variables).unwrap();
    assert_eq!(config.base_arn, base("acs:ram::123456789012:role/"));
    assert_eq!(
        config.annotation_keys.all()[..2],
        ["iam.amazonaws.com/role", "iam.amazonaws.com/external-id"]
    );
    assert_eq!(&*config.namespace_key, "iam.amazonaws.com/allowed-roles");
    assert_eq!(config.namespace_restrictions, Some(PatternFormat::Regexp));
    assert_eq!((config.session_duration, config.metrics_port), (Duration::from_secs(1800), 9543));
    // Two that are refused by this name of the program, with what to do: pods reach the app port, and an
    // account of another cloud's has no roles here.
    assert!(
        parse(&format!("{kube2iam} --metrics-port=8181"), &variables)
            .unwrap_err()
            .to_string()
            .contains("change one of them")
    );
    let foreign = format!("{kube2iam} --base-role-arn=arn:aws:iam::123456789012:role/");
    assert!(parse(&foreign, &variables).unwrap_err().to_string().contains("--base-role-arn"));
}

#[test]
fn open_connections_are_cut_unless_they_are_to_be_kept() {
    assert_eq!(config("").unwrap().open_connections, OpenConnections::Cut);
    assert_eq!(config("--open-connections=keep").unwrap().open_connections, OpenConnections::Keep);
    // The last one wins, and so a manifest's over a variable's.
    assert_eq!(
        config("--open-connections=keep --open-connections=cut").unwrap().open_connections,
        OpenConnections::Cut
    );
    assert!(refusal("--open-connections=true").contains("--open-connections"));
}

#[test]
fn defaults_are_the_predecessors() {
    let config = config("").unwrap();

    assert!(matches!(config.api_server, ApiServer::InCluster));
    assert_eq!((config.app_port, config.metrics_port), (8181, 9181));
    assert_eq!((config.base_arn, config.default_role), (Source::Unset, Source::Unset));
    assert_eq!(config.bpf_dir, PathBuf::from("/sys/fs/bpf/kube2ram"));
    assert_eq!(config.state_dir, PathBuf::from("/run/kube2ram"));
    assert_eq!((config.cgroup_root, config.pods_cgroup, config.host_ip), (None, None, None));
    assert!(!config.debug);
    assert_eq!(config.forward_guard, ForwardGuardMode::Auto);
    assert_eq!(config.wire_guard, WireGuardMode::Auto);
    assert_eq!(config.host_network_pods, HostNetworkPods::Pass);
    assert_eq!(config.metadata_policy, MetadataPolicy::Standard);
    assert_eq!((config.pass_through_rate, config.request_rate, config.require_token), (100, 200, false));
    assert_eq!((config.log_format, config.log_level), (LogFormat::Text, LevelFilter::INFO));
    assert_eq!(config.metadata.v4, "100.100.100.200:80".parse().unwrap());
    assert_eq!(&*config.namespace_key, "ram.aliyuncs.com/allowed-roles");
    assert_eq!(config.namespace_restrictions, None);
    assert_eq!(config.session_duration, Duration::from_secs(3600));
    assert_eq!(config.sts_endpoint, StsEndpoint::Regional);
    assert_eq!(
        config.annotation_keys.all(),
        [
            "ram.aliyuncs.com/role",
            "ram.aliyuncs.com/external-id",
            "ram.aliyuncs.com/policy",
            "ram.aliyuncs.com/session-duration",
            "ram.aliyuncs.com/session-name",
        ]
    );
    assert!(config.notices.is_empty());
}

fn of_program(program: &str, flags: &str, env: &[(&str, &str)]) -> Result<Command, ArgsError> {
    on_machine("machine", program, flags, env)
}

fn on_machine(
    host_name: &str,
    program: &str,
    flags: &str,
    env: &[(&str, &str)],
) -> Result<Command, ArgsError> {
    let args = [program].into_iter().chain(flags.split_whitespace()).map(OsString::from);
    let variable =
        |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
    Command::on_machine(args, &variable, host_name)
}

#[test]
fn a_cloud_brings_its_own_addresses_and_annotations() {
    let config = config("--node=n --cloud=aws").unwrap();

    assert_eq!(config.cloud, Cloud::Aws);
    assert_eq!(config.metadata.to_string(), "169.254.169.254:80 and [fd00:ec2::254]:80");
    assert_eq!(&*config.namespace_key, "iam.amazonaws.com/allowed-roles");
    assert_eq!(
        config.annotation_keys.all(),
        [
            "iam.amazonaws.com/role",
            "iam.amazonaws.com/external-id",
            "iam.amazonaws.com/policy",
            "iam.amazonaws.com/session-duration",
            "iam.amazonaws.com/session-name",
        ]
    );
    let own = parse("--node=n --cloud=aws --iam-policy-key=a.b/c --metadata-addr6=", &[]).unwrap();
    assert_eq!((&*own.annotation_keys.policy, own.metadata.v6), ("a.b/c", None));
    let variables = [("KUBE2RAM_CLOUD", "aws"), ("KUBE2RAM_IAM_ROLE_KEY", "a.b/role")];
    let own = parse("--node=n", &variables).unwrap();
    assert_eq!((&*own.annotation_keys.role, own.cloud), ("a.b/role", Cloud::Aws));
    assert!(parse("--node=n --cloud=gcp", &[]).is_err() && parse("--node=n --cloud=", &[]).is_err());
}

#[test]
fn a_program_called_kube2iam_is_in_its_cloud_unless_it_is_told_another() {
    let cloud = |program: &str, flags: &str, env: &[(&str, &str)]| match of_program(
        program,
        &format!("--node=n {flags}"),
        env,
    )
    .unwrap()
    {
        Command::Agent(config) => config.cloud,
        other => panic!("{other:?}"),
    };

    for program in ["kube2iam", "/kube2iam", "/usr/bin/kube2iam"] {
        assert_eq!(cloud(program, "", &[]), Cloud::Aws, "{program}");
        assert_eq!(cloud(program, "--cloud=alibaba", &[]), Cloud::Alibaba);
        assert_eq!(cloud(program, "", &[("KUBE2RAM_CLOUD", "alibaba")]), Cloud::Alibaba);
    }
    for program in ["kube2ram", "/kube2iam/kube2ram", "xkube2iam", "kube2iam2", ""] {
        assert_eq!(cloud(program, "", &[]), Cloud::Alibaba, "{program}");
    }
}

fn agent_of_program(program: &str, flags: &str) -> Result<Config, ArgsError> {
    match of_program(program, flags, &[])? {
        Command::Agent(config) => Ok(*config),
        other => panic!("{other:?}"),
    }
}

/// kube2iam: the chart at 39fc48d gives both flags its one port, whatever it is.
#[test]
fn a_program_called_kube2iam_keeps_health_and_metrics_off_the_app_port_of_its_chart() {
    for (flags, app_port, metrics_port, notices) in [
        ("--app-port=8181 --metrics-port=8181", 8181, 9181, 1),
        ("--app-port=8282 --metrics-port=8282", 8282, 9181, 1),
        ("--app-port=8181 --metrics-port=9543", 8181, 9543, 0),
        ("", 8181, 9181, 0),
    ] {
        let config = agent_of_program("kube2iam", &format!("--node=n {flags}")).unwrap();

        assert_eq!((config.app_port, config.metrics_port), (app_port, metrics_port), "{flags}");
        assert_eq!(config.notices.len(), notices, "{flags}: {:?}", config.notices);
    }
    // Nothing is left to fall back to.
    let own = agent_of_program("kube2iam", "--node=n --app-port=9181").unwrap_err();
    let other_name =
        agent_of_program("kube2ram", "--node=n --app-port=8181 --metrics-port=8181").unwrap_err();
    for error in [own, other_name] {
        assert!(error.to_string().ends_with("change one of them"), "{error}");
    }
}

/// kube2iam: two DaemonSets of README.md at 75ba9b4 name no node.
#[test]
fn a_program_called_kube2iam_takes_the_machines_name_for_a_node_that_is_not_given() {
    let agent_on = |host_name: &str, program: &str, flags: &str| {
        on_machine(host_name, program, flags, &[]).map(|command| match command {
            Command::Agent(config) => (config.node, config.node_is_host_name, config.notices),
            other => panic!("{other:?}"),
        })
    };

    let (node, is_host_name, notices) = agent_on(" Node-1.Example\n", "/kube2iam", "").unwrap();

    assert_eq!((&*node, is_host_name), ("node-1.example", true), "as the kubelet writes it");
    let notice = "--node is not set: the machine's host name, node-1.example, is taken for the node's name";
    assert_eq!(notices, [notice]);
    let (node, is_host_name, notices) = agent_on("node-1", "/kube2iam", "--node=n").unwrap();
    assert_eq!((&*node, is_host_name, notices.len()), ("n", false, 0));
    assert!(agent_on("node-1", "kube2ram", "").is_err(), "by its own name it is told");
    for no_node in ["", "my_machine", "node,spec.nodeName!=x", "\u{fffd}"] {
        let error = agent_on(no_node, "/kube2iam", "").unwrap_err();
        assert!(error.to_string().contains("set --node"), "{no_node}: {error}");
        assert!(agent_on(no_node, "/kube2iam", "--node=n").is_ok(), "{no_node}");
    }
}

#[test]
fn the_node_checks_health_at_the_app_port_of_a_program_called_kube2iam_alone() {
    let answers = |program| agent_of_program(program, "--node=n").unwrap().answers_health_checks;

    assert_eq!((answers("/kube2iam"), answers("/usr/local/bin/kube2ram")), (true, false));
}

#[test]
fn subcommands_know_the_cloud_wherever_it_is_told() {
    let env = [("KUBE2RAM_CLOUD", "aws")];
    for (program, flags, env) in [
        ("kube2iam", "preflight", &[][..]),
        ("kube2ram", "--cloud=aws preflight", &[]),
        ("kube2ram", "preflight --cloud=aws", &[]),
        ("kube2ram", "preflight", &env),
    ] {
        let Command::Preflight(paths) = of_program(program, flags, env).unwrap() else { panic!("{flags}") };
        assert_eq!(paths.cloud, Cloud::Aws, "{flags}");
        assert_eq!(paths.metadata, Cloud::Aws.dialect().metadata, "{flags}");
    }
    let guard = of_program("kube2ram", "boot-guard apply --cloud=aws", &[]).unwrap();
    let Command::BootGuard(BootGuardCommand::Apply(guard)) = guard else { panic!("{guard:?}") };
    assert_eq!(guard.metadata, Cloud::Aws.dialect().metadata);
}

#[test]
fn roles_are_read_in_the_style_of_the_cloud() {
    let arn = "arn:aws-cn:iam::123456789012:role/";
    let parsed = |flags: &str| parse(&format!("--node=n {flags}"), &[]);

    let config = parsed(&format!("--cloud=aws --base-role-arn={arn} --default-role=a+b")).unwrap();
    assert_eq!(config.base_arn, Source::Given(BaseArn::parse_in(ArnStyle::Aws, arn).unwrap()));
    assert!(parsed(&format!("--cloud=aws --default-role={arn}a")).is_ok());
    for flags in [
        format!("--base-role-arn={arn}"),
        format!("--default-role={arn}a"),
        "--cloud=aws --base-role-arn=acs:ram::1:role/".to_owned(),
        "--cloud=aws --default-role=acs:ram::1:role/a".to_owned(),
    ] {
        let error = parsed(&flags).unwrap_err().to_string();
        assert!(error.ends_with("; check --cloud"), "{error}");
    }
}

#[test]
fn what_a_clouds_sessions_cannot_carry_is_an_error_and_never_left_out() {
    let parsed = |flags: &str| parse(&format!("--node=n {flags}"), &[]);
    let none = Attribution::default();

    let tagged = parsed("--cloud=aws --session-tags=pod --cluster-name=c1 --source-identity").unwrap();
    let rules = &Cloud::Aws.dialect().sessions;
    let exactly = Attribution::try_new(rules, SessionTags::Pod, Some("c1"), true).unwrap();
    assert_eq!(tagged.attribution, exactly);
    let named = parsed("--cloud=aws --cluster-name=c1").unwrap();
    assert_eq!((named.attribution, named.notices.len()), (none, 1));
    for (flags, part) in [
        ("--session-tags=pod", "--session-tags does not work on this cloud"),
        ("--source-identity", "--source-identity does not work on this cloud"),
        ("--cloud=aws --session-tags=all", "give none, workload or pod"),
        ("--cloud=aws --session-tags=workload --cluster-name=a!b", "--cluster-name \"a!b\""),
    ] {
        let error = parsed(flags).unwrap_err().to_string();
        assert!(error.contains(part), "{flags}: {error}");
    }
}

/// Help texts cannot read the table.
#[test]
fn the_help_tells_each_clouds_defaults() {
    let Err(ArgsError::Help(help)) = command("--help", &|_| None) else { panic!("no help") };
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");

    let of = |cloud: Cloud| {
        let dialect = cloud.dialect();
        let keys = &dialect.annotations;
        let (v4, v6) = (dialect.metadata.v4.ip().to_string(), dialect.metadata.v6.unwrap().to_string());
        [keys.role, keys.external_id, keys.policy, keys.duration, keys.session_name, keys.allowed_roles]
            .map(str::to_owned)
            .into_iter()
            .chain([v4, v6])
    };
    for (usual, aws) in of(Cloud::Alibaba).zip(of(Cloud::Aws)) {
        assert!(help.contains(&format!("[default: {usual}; on AWS {aws}]")), "{usual}, {aws}");
    }
}

#[test]
fn knows_three_metadata_policies_and_the_former_name_of_one() {
    for (name, policy) in [
        ("open", MetadataPolicy::Open),
        ("standard", MetadataPolicy::Standard),
        ("closed", MetadataPolicy::Standard),
        ("strict", MetadataPolicy::Strict),
    ] {
        let config = config(&format!("--node=n --metadata-policy={name}")).unwrap();
        assert_eq!(config.metadata_policy, policy, "{name}");
    }
    assert!(config("--node=n --metadata-policy=none").is_err());
}

#[test]
fn takes_every_other_flag() {
    let config = config(
        "--app-port 1 --metrics-port 2 --base-role-arn acs:ram::1:role/team --default-role worker --bpf-dir /b \
         --cgroup-root /c --pods-cgroup /c/kubepods --debug --host-network-pods=deny --metadata-policy=open --log-format=JSON --log-level=warning \
         --metadata-addr 10.9.8.7:8080 --namespace-key=k/n --namespace-restrictions --namespace-restriction-format=Regexp \
         --node=m --ram-role-key=k/r --ram-external-id=k/e --ram-policy-key=k/p --ram-session-duration-key=k/d \
         --ram-session-name-key=s --ram-role-session-ttl=1h0m0s --sts-endpoint=https://sts.example:8443 \
         --pass-through-rate=0 --request-rate=7 --require-token --startup-taint=k/t=v:NoSchedule --state-dir=/s --use-regional-sts-endpoint=false",
    )
    .unwrap();

    assert_eq!((config.app_port, config.metrics_port), (1, 2));
    assert_eq!(config.base_arn, base("acs:ram::1:role/team/"));
    assert_eq!(config.default_role, Source::Given("worker".to_owned()));
    assert_eq!(config.bpf_dir, PathBuf::from("/b"));
    assert_eq!(config.state_dir, PathBuf::from("/s"));
    assert_eq!(config.cgroup_root, Some(PathBuf::from("/c")));
    assert_eq!(config.pods_cgroup, Some(PathBuf::from("/c/kubepods")));
    assert!(config.debug);
    assert_eq!(config.host_network_pods, HostNetworkPods::Deny);
    assert_eq!(config.metadata_policy, MetadataPolicy::Open);
    assert_eq!((config.pass_through_rate, config.request_rate, config.require_token), (0, 7, true));
    assert_eq!((config.log_format, config.log_level), (LogFormat::Json, LevelFilter::WARN));
    assert_eq!(config.metadata.v4, "10.9.8.7:8080".parse().unwrap());
    assert_eq!(&*config.namespace_key, "k/n");
    assert_eq!(config.namespace_restrictions, Some(PatternFormat::Regexp));
    assert_eq!(config.node, "m");
    assert_eq!(config.annotation_keys.all(), ["k/r", "k/e", "k/p", "k/d", "s"]);
    assert_eq!(config.session_duration, Duration::from_secs(7200));
    assert_eq!(config.startup_taint, Some("k/t=v:NoSchedule".parse().unwrap()));
    assert_eq!(config.sts_endpoint, StsEndpoint::Only(Endpoint::parse("https://sts.example:8443").unwrap()));
    assert!(config.notices.is_empty());
}

#[test]
fn takes_kube2iams_spellings() {
    let config = config("--iam-role-key=a/b --iam-external-id=c/d --iam-role-session-ttl=15m").unwrap();

    assert_eq!(config.annotation_keys.all()[..2], ["a/b", "c/d"]);
    assert_eq!(config.session_duration, Duration::from_secs(1800));
}

#[test]
fn switches_take_gos_booleans_after_an_equals_sign_only() {
    for on in
        ["--debug", "--debug=1", "--debug=t", "--debug=T", "--debug=true", "--debug=True", "--debug=TRUE"]
    {
        assert!(config(on).unwrap().debug, "{on}");
    }
    for off in ["--debug=0", "--debug=f", "--debug=F", "--debug=false", "--debug=False", "--debug=FALSE"] {
        assert!(!config(off).unwrap().debug, "{off}");
    }
    assert_eq!(
        refusal("--debug=yes"),
        "invalid value 'yes' for '--debug[=<BOOL>]': give true or false (see kube2ram --help)"
    );
    assert_eq!(refusal("--debug false"), "unrecognized subcommand 'false' (see kube2ram --help)");
    assert!(refusal("--iptables=banana").contains("give true or false"));
}

#[test]
fn the_last_flag_of_a_name_wins() {
    let config = config("--debug --debug=false --app-port=1 --app-port=2").unwrap();

    assert!(!config.debug);
    assert_eq!(config.app_port, 2);
}

#[test]
fn every_flag_is_a_variable_that_the_command_line_overrides() {
    let variables = [
        ("KUBE2RAM_NODE", "m"),
        ("NODE_NAME", "n"),
        ("KUBE2RAM_APP_PORT", "1"),
        ("KUBE2RAM_METRICS_PORT", "2"),
        ("KUBE2RAM_VERBOSE", "true"),
        ("KUBE2RAM_API_SERVER", "https://api"),
        ("KUBE2RAM_API_TOKEN", "secret"),
        ("KUBE2RAM_IPTABLES", "true"),
        ("KUBE2RAM_DEFAULT_ROLE", ""),
        ("HOST_IP", "10.0.0.1"),
    ];

    let config = parse("--metrics-port=3", &variables).unwrap();

    assert_eq!((&*config.node, config.app_port, config.metrics_port), ("m", 1, 3));
    assert_eq!(config.log_level, LevelFilter::DEBUG);
    assert_eq!(config.default_role, Source::Unset);
    assert_eq!(config.host_ip, Some("10.0.0.1".parse().unwrap()));
    assert_eq!(config.notices.len(), 1);
    let ApiServer::Url { token: Some(token), .. } = config.api_server else { panic!("no token") };
    assert_eq!(token.expose_secret(), "secret");
}

#[test]
fn an_empty_host_ip_counts_as_unset() {
    let host_ip = |flags: &str, variables: &[(&str, &str)]| {
        parse(&format!("--node=n {flags}"), variables).unwrap().host_ip
    };
    let given = Some("10.0.0.1".parse().unwrap());

    assert_eq!(host_ip("--host-ip=", &[]), None);
    // The component `migration` passes `--host-ip=$(HOST_IP)`.
    assert_eq!(host_ip("--host-ip=", &[("HOST_IP", "")]), None);
    for variable in ["HOST_IP", "KUBE2RAM_HOST_IP"] {
        assert_eq!(host_ip("", &[(variable, "")]), None, "{variable}");
        assert_eq!(host_ip("", &[(variable, "10.0.0.1")]), given, "{variable}");
    }
    assert_eq!(host_ip("--host-ip=10.0.0.1", &[("HOST_IP", "")]), given);
}

#[test]
fn the_variables_of_a_service_are_not_flags() {
    let link = "tcp://10.0.0.1:9181";

    let config = parse("", &[("NODE_NAME", "n"), ("KUBE2RAM_METRICS_PORT", link)]).unwrap();

    assert_eq!(config.metrics_port, 9181);
    assert!(parse("", &[("NODE_NAME", "n"), ("KUBE2RAM_METRICS_PORT", "x")]).is_err());
}

#[test]
fn the_token_is_not_in_what_is_printed() {
    let config = config("--api-server=https://api --api-token=hunter2").unwrap();

    assert!(!format!("{config:?}").contains("hunter2"));
    assert!(!refusal("--api-token=hunter2").contains("hunter2"));
}

#[test]
fn finds_the_base_arn_and_the_default_role() {
    let own = "acs:ram::1:role/x";
    let cases = [
        ("--auto-discover-base-arn", Source::Discover, Source::Unset),
        ("--auto-discover-base-arn --default-role=x", Source::Discover, Source::Given("x".to_owned())),
        ("--default-role=acs:ram::1:role/x", Source::Unset, Source::Given(own.to_owned())),
        ("--auto-discover-default-role", Source::Discover, Source::Discover),
        (
            "--auto-discover-default-role --base-role-arn=acs:ram::1:role",
            base("acs:ram::1:role/"),
            Source::Discover,
        ),
        ("--base-role-arn= --default-role=", Source::Unset, Source::Unset),
    ];

    for (flags, base_arn, default_role) in cases {
        let config = config(flags).expect(flags);

        assert_eq!((config.base_arn, config.default_role), (base_arn, default_role), "{flags}");
    }
}

#[test]
fn finds_the_api_server() {
    assert!(
        matches!(config("--kubeconfig=/k").unwrap().api_server, ApiServer::Kubeconfig(path) if path == *"/k")
    );
    let anonymous = config("--api-server=http://127.0.0.1:8001").unwrap().api_server;
    assert!(matches!(anonymous, ApiServer::Url { token: None, insecure: false, .. }));
    let insecure = config("--api-server=https://10.0.0.1:6443/k8s --insecure").unwrap().api_server;
    assert!(matches!(insecure, ApiServer::Url { insecure: true, .. }));
    assert_eq!(config("--insecure").unwrap().notices, ["--insecure has no effect without --api-server"]);
}

#[test]
fn sts_endpoints_are_https_or_loopback() {
    for endpoint in ["https://sts.aliyuncs.com", "sts.aliyuncs.com", "http://127.0.0.1:1", "http://[::1]:1"] {
        assert!(config(&format!("--sts-endpoint={endpoint}")).is_ok(), "{endpoint}");
    }
    for endpoint in [
        "http://sts.aliyuncs.com",
        "http://localhost:1",
        "ftp://localhost",
        "https://sts/path",
        "https://sts/?query",
        "https://sts/#fragment",
        "https://user@sts",
        "https://:password@sts",
    ] {
        let line = refusal(&format!("--sts-endpoint={endpoint}"));
        assert!(line.contains("give https://<host>[:<port>]; http:// for loopback addresses only"), "{line}");
    }
    assert_eq!(config("--use-regional-sts-endpoint=false").unwrap().sts_endpoint, StsEndpoint::Global);
}

#[test]
fn half_a_session_is_7m30s_to_6h() {
    for (ttl, seconds) in [("7m30s", 900), ("6h", 43_200), ("1.5h", 10_800)] {
        let config = config(&format!("--ram-role-session-ttl={ttl}")).unwrap();
        assert_eq!(config.session_duration, Duration::from_secs(seconds));
    }
    for ttl in ["7m29s", "6h1s", "500y"] {
        assert!(refusal(&format!("--ram-role-session-ttl={ttl}")).contains("give 7m30s to 6h"), "{ttl}");
    }
}

#[test]
fn a_level_wins_over_verbose() {
    assert_eq!(config("--verbose --log-level=error").unwrap().log_level, LevelFilter::ERROR);
    assert_eq!(config("--verbose").unwrap().log_level, LevelFilter::DEBUG);
}

#[test]
fn refuses_what_does_not_go_together() {
    let cases = [
        (
            "--auto-discover-base-arn --base-role-arn=acs:ram::1:role/",
            "--base-role-arn and --auto-discover-base-arn exclude each other: drop one of them",
        ),
        (
            "--auto-discover-default-role --default-role=x",
            "--default-role and --auto-discover-default-role exclude each other: drop one of them",
        ),
        (
            "--kubeconfig=/k --api-server=https://api",
            "--kubeconfig and --api-server exclude each other: drop one of them",
        ),
        ("--api-token=t", "--api-token is nothing without --api-server: add it, or drop the token"),
        (
            "--api-token=t --kubeconfig=/k",
            "--api-token is nothing without --api-server: add it, or drop the token",
        ),
        (
            "--api-token=t --api-server=http://api",
            "--api-token and --insecure need an --api-server with https://",
        ),
        (
            "--insecure --api-server=http://api",
            "--api-token and --insecure need an --api-server with https://",
        ),
        (
            "--app-port=9181",
            "--app-port and --metrics-port are both 9181: pods can reach the app port, so health checks and metrics need another port; change one of them",
        ),
        (
            "--default-role=x",
            "--default-role is a bare name: add --base-role-arn or --auto-discover-base-arn, or give the role's ARN",
        ),
        (
            "--default-role=acs:ram::1:user/x",
            "--default-role \"acs:ram::1:user/x\" is not a role's ARN, acs:ram::<account>:role/<name>",
        ),
        (
            "--base-role-arn=acs:ram::1:role/ --default-role=a//b",
            "--default-role \"a//b\" has an empty, '.' or '..' segment in the role's path",
        ),
        (
            "--base-role-arn=acs:oss::1:role/",
            "--base-role-arn \"acs:oss::1:role/\" is not a base ARN, acs:ram::<account>:role/, with or without a path",
        ),
    ];

    for (flags, line) in cases {
        assert_eq!(refusal(flags), line);
    }
}

#[test]
fn refuses_an_unknown_node() {
    let error = parse("", &[]).unwrap_err();

    assert_eq!(
        error.to_string(),
        "the node's name is not known: set --node, or the variable NODE_NAME from spec.nodeName"
    );
}

#[test]
fn refuses_malformed_values() {
    let cases = [
        ("--app-port=0", "'--app-port <PORT>': 0 is not in 1..=65535"),
        ("--metrics-port=65536", "'--metrics-port <PORT>': 65536 is not in 1..=65535"),
        ("--host-ip=me", "'--host-ip <IP>': give an address of this node, such as 192.0.2.10"),
        (
            "--host-network-pods=maybe",
            "'--host-network-pods <HOST_NETWORK_PODS>' [possible values: deny, pass]",
        ),
        ("--log-format=xml", "'--log-format <FORMAT>': give text or json"),
        ("--log-level=loud", "'--log-level <LEVEL>': give trace, debug, info, warn or error"),
        ("--metadata-addr=::1", "give an IPv4 address, or <address>:<port>"),
        ("--metadata-addr=100.100.100.200:0", "give an IPv4 address, or <address>:<port>"),
        ("--metadata-addr6=::1", "give an IPv6 address without brackets, or an empty value for none"),
        ("--metadata-addr6=[fd00:100::100:200]", "give an IPv6 address without brackets"),
        ("--metadata-addr6=::ffff:10.0.0.1", "give an IPv6 address without brackets"),
        ("--metadata-addr6=ff02::1", "give an IPv6 address without brackets"),
        ("--namespace-restriction-format=regex", "give glob or regexp"),
        ("--node=a,spec.nodeName=b", "give the name of a Node: up to 253 of a-z, 0-9, '-' and '.'"),
        ("--ram-role-key=", "give an annotation key, such as example.com/role"),
        ("--ram-role-key=a/b/c", "give an annotation key, such as example.com/role"),
        ("--ram-role-session-ttl=30", "give a number with a unit, such as 15m or 1h30m"),
        ("--api-server=10.0.0.1:6443", "give https://<host>[:<port>]"),
        ("--api-server=https://me:pass@api", "give https://<host>[:<port>]"),
        ("--kubeconfig", "a value is required for '--kubeconfig <PATH>' but none was supplied"),
        ("--startup-taint=k:Never", "give <key>[=<value>][:<effect>], such as"),
        ("boot-guard install --host-cgroup=/system.slice", "give a cgroup relative to the root, such as"),
        ("boot-guard apply --host-cgroup=a/../b", "give a cgroup relative to the root, such as"),
        ("--verbos", "unexpected argument '--verbos' found tip: a similar argument exists: '--verbose'"),
        ("surplus", "unrecognized subcommand 'surplus'"),
    ];

    for (flags, part) in cases {
        let line = refusal(flags);
        assert!(line.contains(part), "{flags}: {line}");
    }
}

#[test]
fn line_breaks_in_values_do_not_break_the_line() {
    let args = ["kube2ram", "--log-level=a\n\nUsage:\nb"].map(OsString::from);

    let error = Command::from_args(args, &|_| None).unwrap_err();

    assert!(!error.to_string().contains('\n'), "{error}");
}

#[test]
fn each_retired_flag_is_noticed_when_set() {
    let flags = "--backoff-max-elapsed-time=2s --backoff-max-interval 1s --cache-resync-period=30m --host-interface=eth0 \
                 --iptables --resolve-duplicate-cache-ips=false";

    let notices = config(flags).unwrap().notices;

    assert_eq!(notices.len(), 6);
    assert!(notices.iter().all(|notice| notice.contains(" has no effect: ") && !notice.contains('\n')));
}

#[test]
fn help_and_version_are_no_failures() {
    let help = config("--help").unwrap_err();
    let version = config("--version").unwrap_err();

    assert_eq!((help.exit_code(), version.exit_code()), (0, 0));
    assert_eq!(version.to_string(), concat!("kube2ram ", env!("CARGO_PKG_VERSION"), "\n"));
    insta::assert_snapshot!(help);
}

const BY_ACCOUNT: &str = "--credentials-from=service-account";
const PROVIDER: &str = "acs:ram::1234567890123456:oidc-provider/ack-rrsa-c0123";

#[test]
fn roles_are_the_nodes_to_assume_unless_a_flag_says_otherwise() {
    let config = config("").unwrap();

    assert_eq!(config.credentials_from, CredentialsFrom::Node);
    assert_eq!(config.token_requests_as, TokenRequestsAs::Node);
    assert!(!config.reads_service_accounts && config.notices.is_empty());
    assert!(config.oidc_provider.is_none() && config.audit_file.is_none());
    assert_eq!(config.annotation_keys.account_bounded(), None);
}

#[test]
fn service_accounts_are_read_where_a_flag_says_so_and_by_their_tokens_always() {
    let by_tokens = format!("{BY_ACCOUNT} --oidc-provider-arn={PROVIDER}");
    for (flags, from, key) in [
        ("--service-account-roles", CredentialsFrom::Node, "pod-identity.alibabacloud.com/role-name"),
        ("--cloud=aws --service-account-roles", CredentialsFrom::Node, "eks.amazonaws.com/role-arn"),
        (&*by_tokens, CredentialsFrom::ServiceAccount, "pod-identity.alibabacloud.com/role-name"),
        (
            "--cloud=aws --credentials-from=service-account --service-account-roles=false",
            CredentialsFrom::ServiceAccount,
            "eks.amazonaws.com/role-arn",
        ),
    ] {
        let config = config(flags).unwrap();

        assert!(config.reads_service_accounts, "{flags}");
        assert_eq!(config.credentials_from, from, "{flags}");
        assert_eq!(config.annotation_keys.account_role.as_deref(), Some(key), "{flags}");
        assert!(config.notices.is_empty(), "{flags}: {:?}", config.notices);
    }
}

#[test]
fn the_keys_of_service_accounts_are_the_flags_too() {
    let config = config("--service-account-roles --ram-role-key=a/b --ram-policy-key=c/d").unwrap();

    let keys = config.annotation_keys.account_bounded().unwrap().map(|(key, _)| key);

    assert_eq!(keys[..3], ["a/b", "pod-identity.alibabacloud.com/role-name", "c/d"]);
}

#[test]
fn the_provider_is_a_flag_or_the_variable_of_the_clouds_webhook() {
    let variable = ("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", PROVIDER);
    let own = format!("{BY_ACCOUNT} --oidc-provider-arn=acs:ram::1:oidc-provider/own");
    for (flags, variables, provider) in [
        (BY_ACCOUNT, &[variable][..], PROVIDER),
        (&*own, &[variable], "acs:ram::1:oidc-provider/own"),
        (&*own, &[], "acs:ram::1:oidc-provider/own"),
    ] {
        let variables: Vec<_> = [("NODE_NAME", "n")].into_iter().chain(variables.iter().copied()).collect();
        let config = parse(flags, &variables).unwrap();

        assert_eq!(config.oidc_provider.unwrap().as_str(), provider);
        assert!(config.notices.is_empty(), "{:?}", config.notices);
    }
    // Where nothing is exchanged, and on a cloud whose exchange takes none, it does no harm.
    for flags in ["", "--cloud=aws", "--cloud=aws --credentials-from=service-account"] {
        assert!(parse(flags, &[("NODE_NAME", "n"), variable]).is_ok(), "{flags}");
    }
}

#[test]
fn what_the_exchange_of_a_token_cannot_carry_is_refused() {
    let on_aws = "--cloud=aws --credentials-from=service-account";
    let cases = [
        (
            BY_ACCOUNT.to_owned(),
            "--credentials-from=service-account needs the cluster's OIDC provider: add --oidc-provider-arn, or the variable ALIBABA_CLOUD_OIDC_PROVIDER_ARN",
        ),
        (
            format!("{on_aws} --session-tags=workload"),
            "--session-tags and --credentials-from=service-account exclude each other, because session tags cannot be sent with a ServiceAccount's token: drop one of them",
        ),
        (
            format!("{on_aws} --source-identity"),
            "--source-identity and --credentials-from=service-account exclude each other, because a source identity cannot be sent with a ServiceAccount's token: drop one of them",
        ),
    ];

    for (flags, line) in cases {
        assert_eq!(refusal(&flags), line);
    }
    assert!(config(on_aws).is_ok());
    assert!(config("--cloud=aws --session-tags=workload --source-identity").is_ok());
    for (flags, part) in [
        ("--credentials-from=pod", "'--credentials-from <SOURCE>': give node or service-account"),
        ("--token-requests-as=kubelet", "'--token-requests-as <REQUESTER>': give node or agent"),
        ("--oidc-provider-arn=acs:ram::1:role/x", "give acs:ram::<account>:oidc-provider/<name>"),
        ("--audit-file=audit.jsonl", "'--audit-file <PATH>': give the absolute path of a file"),
        ("--audit-file=/", "give the absolute path of a file"),
        ("--audit-file=/var/log/", "give the absolute path of a file"),
    ] {
        let line = refusal(flags);
        assert!(line.contains(part), "{flags}: {line}");
    }
    let file = config("--audit-file=/run/kube2ram/audit.jsonl").unwrap().audit_file;
    assert_eq!(file, Some(PathBuf::from("/run/kube2ram/audit.jsonl")));
}

#[test]
fn preflight_checks_the_token_with_which_the_node_is_impersonated() {
    let by_account = format!("{BY_ACCOUNT} --oidc-provider-arn={PROVIDER}");
    for (flags, expected) in [
        ("", false),
        ("--token-requests-as=node", false),
        (&*by_account, true),
        (&*format!("{by_account} --token-requests-as=agent"), false),
        (&*format!("{by_account} --kubeconfig=/k"), false),
        (&*format!("{by_account} --api-server=https://api"), false),
    ] {
        let paths = match command(&format!("{flags} preflight"), &|_| None).unwrap() {
            Command::Preflight(paths) => paths,
            other => panic!("{flags}: {other:?}"),
        };

        assert_eq!(paths.impersonates_node, expected, "{flags}");
        assert_eq!(config(flags).unwrap().node_paths().impersonates_node, expected, "{flags}");
    }
    let line = "preflight --credentials-from=service-account --token-requests-as=agent";
    assert!(matches!(command(line, &|_| None), Ok(Command::Preflight(_))), "both are global");
}

#[test]
fn what_has_no_effect_with_the_other_way_is_noticed() {
    let unused = config("--token-requests-as=agent").unwrap().notices;
    assert_eq!(unused, ["--token-requests-as has no effect without --credentials-from=service-account"]);
    let used = config("--cloud=aws --credentials-from=service-account --token-requests-as=agent").unwrap();
    assert_eq!(used.token_requests_as, TokenRequestsAs::Agent);
    assert!(used.notices.is_empty(), "{:?}", used.notices);

    let keys = [
        ("NODE_NAME", "n"),
        ("ALIBABA_CLOUD_ROLE_ARN", "acs:ram::1:role/agent"),
        ("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", PROVIDER),
        ("ALIBABA_CLOUD_OIDC_TOKEN_FILE", "/token"),
        ("AWS_ACCESS_KEY_ID", ""),
    ];
    let notices = parse(BY_ACCOUNT, &keys).unwrap().notices;
    assert_eq!(notices.len(), 1, "{notices:?}");
    let names = "ALIBABA_CLOUD_OIDC_TOKEN_FILE, ALIBABA_CLOUD_ROLE_ARN has no effect with --credentials-from";
    assert!(notices[0].starts_with(names), "{notices:?}");
    assert!(parse("", &keys).unwrap().notices.is_empty());
    for (name, _) in &keys[1..] {
        assert!(is_of_own_credentials(name), "{name}");
    }
    assert!(!is_of_own_credentials("AWS_REGION") && !is_of_own_credentials("NODE_NAME"));
}
