use proptest::prelude::*;

use super::*;

/// The configuration in ack-ram-authenticator's older `example.yaml`, without its comments.
const EXAMPLE: &str = include_str!("tests/predecessor-example.yaml");
/// That in its current `deploy/example.yaml` (72c9dbf), likewise: some keys have no value.
const CURRENT_EXAMPLE: &str = include_str!("tests/predecessor-deploy-example.yaml");

/// The flags in the older example.
fn example_flags() -> Given {
    Given {
        state_dir: Some("/var/ack-ram-authenticator".into()),
        generate_kubeconfig: Some("/etc/kubernetes/ack-ram-authenticator/kubeconfig.yaml".into()),
        ..Given::default()
    }
}

/// The flags in the current one.
fn current_example_flags() -> Given {
    Given {
        state_dir: Some("/var/ack-ram-authenticator".into()),
        kubeconfig_pregenerated: Some(true),
        ..Given::default()
    }
}

fn parse(text: &str) -> Result<ConfigFile, ConfigError> {
    ConfigFile::parse(text, Path::new("config.yaml"))
}

fn config(given: Given, file: &str) -> Result<Config, ConfigError> {
    Config::try_new(given, parse(file).unwrap())
}

fn of_file(file: &str) -> Config {
    config(Given::default(), &format!("clusterID: c\n{file}")).unwrap()
}

fn modes(config: &Config) -> Vec<Mode> {
    config.backends.iter().map(|(mode, _)| *mode).collect()
}

#[test]
fn the_older_example_of_ack_ram_authenticator_is_read_as_it_stands() {
    let config = config(example_flags(), EXAMPLE).unwrap();

    assert_eq!(&*config.cluster_id, "my-dev-cluster.example.com");
    assert_eq!(modes(&config), [Mode::MountedFile]);
    assert_eq!((config.webhook.port, config.webhook.address), (21362, ADDRESS));
    assert_eq!(config.webhook.state_dir, Path::new("/var/ack-ram-authenticator"));
    assert_eq!(&*config.webhook.hostname, "localhost");
    assert!(!config.kubeconfig_pregenerated);
}

#[test]
fn the_current_example_of_ack_ram_authenticator_is_read_as_it_stands() {
    let config = config(current_example_flags(), CURRENT_EXAMPLE).unwrap();

    assert_eq!(&*config.cluster_id, "<your-cluster-id>");
    assert_eq!(modes(&config), [Mode::Crd]);
    assert_eq!((config.webhook.port, config.webhook.address), (21362, ADDRESS));
    assert_eq!(config.webhook.state_dir, Path::new("/var/ack-ram-authenticator"));
    assert_eq!(config.webhook.generate_kubeconfig, Path::new(GENERATE_KUBECONFIG));
    assert!(config.kubeconfig_pregenerated);
    assert!(matches!(config.client(), ClientConfig::InCluster));
    // A key without a value is as one that is not there.
    assert_eq!(config.notices.len(), 1, "{:?}", config.notices);
}

#[test]
fn the_cluster_id_of_an_example_is_used_with_a_warning() {
    for (file, id) in [(EXAMPLE, "my-dev-cluster.example.com"), (CURRENT_EXAMPLE, "<your-cluster-id>")] {
        let [notice] = config(Given::default(), file).unwrap().notices.try_into().unwrap();

        assert!(notice.contains(&format!("{id} is that of an example")), "{notice}");
        let of_flag = Given { cluster_id: Some("my-cluster".into()), ..Given::default() };
        assert!(config(of_flag, file).unwrap().notices.is_empty(), "the allowed twin");
    }
}

#[test]
fn the_full_format_of_its_readme_is_read() {
    let file = r#"
clusterID: dev.example.com
defaultRole: acs:ram::000000000000:role/KubernetesAdmin
server:
  port: 21363
  stateDir: /var/x
  generateKubeconfig: /etc/x.kubeconfig
  hostname: auth.example.com
  address: 0.0.0.0
  region: cn-beijing
  kubeconfigPregenerated: true
  kubeconfig: /etc/kubernetes/admin.conf
  backendMode:
  - MountedFile
  - CRD
  mapAccounts:
  - "000000000000"
"#;

    let config = config(Given::default(), file).unwrap();

    assert_eq!((config.webhook.port, config.webhook.address), (21363, "0.0.0.0".parse().unwrap()));
    assert_eq!(config.webhook.state_dir, Path::new("/var/x"));
    assert_eq!(config.webhook.generate_kubeconfig, Path::new("/etc/x.kubeconfig"));
    assert_eq!(&*config.webhook.hostname, "auth.example.com");
    assert_eq!(config.region, Some(Region::parse("cn-beijing").unwrap()));
    assert!(config.kubeconfig_pregenerated);
    assert!(
        matches!(config.client(), ClientConfig::Kubeconfig(path) if path == Path::new("/etc/kubernetes/admin.conf"))
    );
    assert_eq!(modes(&config), [Mode::MountedFile, Mode::Crd]);
    assert_eq!(config.notices, ["defaultRole in the configuration file has no effect"]);
}

#[test]
fn a_flag_goes_before_the_file() {
    let given = Given {
        address: Some("::1".parse().unwrap()),
        backend_modes: vec!["CRD,ConfigMap".into()],
        cluster_id: Some("flag".into()),
        port: Some(1),
        region: Some("cn-shanghai".into()),
        state_dir: Some("/flag".into()),
        kubeconfig_pregenerated: Some(false),
        ..Given::default()
    };

    let config = config(
        given,
        "clusterID: file\nserver: {address: 127.0.0.2, backendMode: File, port: 2, region: r, stateDir: /file, kubeconfigPregenerated: true}",
    )
    .unwrap();

    assert_eq!((&*config.cluster_id, config.webhook.port), ("flag", 1));
    assert_eq!(config.webhook.address, "::1".parse::<IpAddr>().unwrap());
    assert_eq!(modes(&config), [Mode::Crd, Mode::AckConfigMap]);
    assert_eq!(config.region, Some(Region::parse("cn-shanghai").unwrap()));
    assert_eq!(config.webhook.state_dir, Path::new("/flag"));
    assert!(!config.kubeconfig_pregenerated);
}

#[test]
fn keys_are_read_in_any_case_as_by_viper() {
    let config =
        config(Given::default(), "CLUSTERID: c\nSERVER:\n  BackendMode: CRD\n  statedir: /s\n").unwrap();

    assert_eq!(modes(&config), [Mode::Crd]);
    assert_eq!(config.webhook.state_dir, Path::new("/s"));
}

#[test]
fn backends_may_be_a_text_of_several() {
    assert_eq!(modes(&of_file("server: {backendMode: 'File CRD'}")), [Mode::MountedFile, Mode::Crd]);
    assert_eq!(modes(&of_file("server: {backendMode: ['File,CRD']}")), [Mode::MountedFile, Mode::Crd]);
    let wrong = config(Given::default(), "clusterID: c\nserver: {backendMode: [File, X]}");
    assert!(matches!(wrong, Err(ConfigError::Backends(ModeError::Unknown(_)))));
}

#[test]
fn a_cluster_id_is_required() {
    for file in ["", "server: {}", "clusterID: ''", "clusterID:"] {
        assert!(matches!(config(Given::default(), file), Err(ConfigError::ClusterId)), "{file:?}");
    }
    let given = Given { cluster_id: Some("c".into()), ..Given::default() };
    assert!(config(given, "").is_ok(), "the allowed twin");
}

/// It may be misspelt, and would silently have no effect.
#[test]
fn an_unknown_key_is_refused_and_one_without_effect_is_noticed() {
    for (file, named) in [
        ("clusterId: c\nclusterName: x", "clustername"),
        ("clusterID: c\nserver: {mapRole: []}", "server.maprole"),
    ] {
        let error = parse(file).unwrap_err();
        assert!(matches!(&error, ConfigError::UnknownKey(key) if &**key == named), "{error:?}");
    }
    let config = of_file("server: {bind: 0.0.0.0, master: x, scrubbedAccounts: ['1']}");
    assert_eq!(config.notices.len(), 3);
}

#[test]
fn usernames_of_the_system_are_reserved_and_more_can_be() {
    let config = of_file(
        "server:\n  backendMode: [File, CRD, ConfigMap]\n  reservedPrefixConfig:\n  - backendMode: CRD\n    \
         usernamePrefixReserveList: ['ops:', '']\n    groupPrefixReserveList: ['system:']\n  - backendMode: File\n    \
         allowSystemUsernames: true\n    usernamePrefixReserveList: ['x']\n",
    );

    let reserved = |n: usize| {
        let Restrictions { reserved_usernames, reserved_groups, .. } = &config.backends[n].1;
        (reserved_usernames.join(" "), reserved_groups.join(" "))
    };
    assert_eq!(reserved(0), ("x".to_owned(), String::new()));
    assert_eq!(reserved(1), ("system: ops:".to_owned(), "system:".to_owned()));
    assert_eq!(reserved(2), ("system:".to_owned(), String::new()));
    let misspelt = "server: {reservedPrefixConfig: [{backendMode: CRD, usernamePrefixes: ['x']}]}";
    assert!(matches!(parse(misspelt), Err(ConfigError::Yaml { .. })), "it would reserve nothing");
    let unknown = "clusterID: c\nserver: {reservedPrefixConfig: [{backendMode: X}]}";
    assert!(matches!(
        Config::try_new(Given::default(), parse(unknown).unwrap()),
        Err(ConfigError::ReservedPrefixes(_))
    ));
}

#[test]
fn session_names_and_names_without_ids_are_trusted_where_the_file_says_so() {
    let strict = |config: &Config| {
        config
            .backends
            .iter()
            .map(|(_, allowed)| (allowed.trusts_session_names, allowed.needs_user_id))
            .collect::<Vec<_>>()
    };

    assert_eq!(strict(&of_file("server: {backendMode: [File, DynamicFile]}")), [(false, false); 2]);
    let config = of_file(
        "server: {backendMode: [File, DynamicFile], trustSessionNames: true, dynamicFileUserIDStrict: true}",
    );
    assert_eq!(strict(&config), [(true, false), (true, true)]);
    let config = of_file("server: {backendMode: [File, CRD], userIDStrict: true}");
    assert_eq!(strict(&config), [(false, true); 2]);
}

#[test]
fn an_address_and_a_region_are_one() {
    let wrong = config(Given::default(), "clusterID: c\nserver: {address: localhost}");
    assert!(matches!(wrong, Err(ConfigError::Address(text)) if &*text == "localhost"));
    assert_eq!(of_file("server: {address: ''}").webhook.address, ADDRESS);
    let wrong = config(Given::default(), "clusterID: c\nserver: {region: 'sts.example.com/x'}");
    assert!(matches!(wrong, Err(ConfigError::Region(text)) if &*text == "sts.example.com/x"));
    assert_eq!(of_file("server: {region: ''}").region, None);
}

#[test]
fn a_file_that_is_missing_or_malformed_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let given = Given { config: Some(path.clone()), ..Given::default() };

    let missing = Config::load(given.clone()).unwrap_err().to_string();
    assert_eq!(missing, format!("cannot read the configuration file {}", path.display()));
    fs::write(&path, "server: [").unwrap();
    assert!(matches!(Config::load(given.clone()), Err(ConfigError::Yaml { .. })));
    fs::write(&path, "clusterID: c\nother: 1").unwrap();
    assert!(matches!(Config::load(given.clone()), Err(ConfigError::UnknownKey(key)) if &*key == "other"));
    fs::write(&path, EXAMPLE).unwrap();
    assert_eq!(Config::load(given).unwrap().config_file, Some(path));
}

#[test]
fn init_writes_here_without_a_file_and_where_the_server_looks_with_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    fs::write(&path, "server: {stateDir: /s, hostname: h, port: 3}").unwrap();

    let here = Webhook::load(&Given::default()).unwrap();
    let there = Webhook::load(&Given { config: Some(path), port: Some(4), ..Given::default() }).unwrap();

    assert_eq!(here.state_dir, Path::new("."));
    assert_eq!(here.generate_kubeconfig, Path::new("ack-ram-authenticator.kubeconfig"));
    assert_eq!((&*here.hostname, here.address, here.port), ("localhost", ADDRESS, 21362));
    assert_eq!((there.state_dir, there.port, &*there.hostname), ("/s".into(), 4, "h"));
    assert_eq!(there.generate_kubeconfig, Path::new(GENERATE_KUBECONFIG));
}

proptest! {
    #[test]
    fn never_panics(text in any::<String>(), lines in "([a-zA-Z:\\[\\]{}&*!| -]{0,16}\n){0,8}") {
        drop(parse(&text));
        drop(parse(&lines));
    }
}
