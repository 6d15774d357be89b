use clap::CommandFactory as _;

use super::*;

fn parse_with(line: &str, env: &[(&str, &str)]) -> Result<Args, ArgsError> {
    let words = ["kube2ram-authenticator"].into_iter().chain(line.split_whitespace()).map(OsString::from);
    let env = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    Args::parse(words, &env)
}

fn parse(line: &str) -> Result<Args, ArgsError> {
    parse_with(line, &[])
}

fn server(line: &str) -> Server {
    match parse(line).unwrap().command {
        Command::Server(server) => *server,
        other => panic!("{other:?}"),
    }
}

fn token(line: &str) -> Token {
    match parse(line).unwrap().command {
        Command::Token(token) => token,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_declaration_is_sound() {
    flags::command().debug_assert();
    Flags::command().debug_assert();
}

#[test]
fn the_arguments_of_ack_ram_authenticators_manifests_are_taken() {
    let server = server(
        "server --config=/etc/ack-ram-authenticator/config.yaml --state-dir=/var/ack-ram-authenticator \
         --generate-kubeconfig=/etc/kubernetes/ack-ram-authenticator/kubeconfig.yaml --backend-mode=CRD,File \
         --backend-mode ConfigMap --kubeconfig-pregenerated=true --port 21362 --region cn-hangzhou",
    );

    let Given {
        config,
        state_dir,
        generate_kubeconfig,
        backend_modes,
        kubeconfig_pregenerated,
        port,
        region,
        ..
    } = server.given;
    assert_eq!(config, Some("/etc/ack-ram-authenticator/config.yaml".into()));
    assert_eq!(state_dir, Some("/var/ack-ram-authenticator".into()));
    assert_eq!(generate_kubeconfig, Some("/etc/kubernetes/ack-ram-authenticator/kubeconfig.yaml".into()));
    assert_eq!(backend_modes, ["CRD,File", "ConfigMap"]);
    assert_eq!((kubeconfig_pregenerated, port), (Some(true), Some(21362)));
    assert_eq!(region.as_deref(), Some("cn-hangzhou"));
}

/// Those of the server and of the init container in its current `deploy/example.yaml`.
#[test]
fn the_arguments_of_ack_ram_authenticators_current_example_are_taken_as_they_stand() {
    let given = server(
        "server --config=/etc/ack-ram-authenticator/config.yaml --state-dir=/var/ack-ram-authenticator \
         --kubeconfig-pregenerated=true",
    )
    .given;
    let Command::Init(init) = parse("init --cluster-id=<your-cluster-id>").unwrap().command else { panic!() };

    assert_eq!(given.config, Some("/etc/ack-ram-authenticator/config.yaml".into()));
    assert_eq!(given.state_dir, Some("/var/ack-ram-authenticator".into()));
    assert_eq!(given.kubeconfig_pregenerated, Some(true));
    let Given { backend_modes, cluster_id, generate_kubeconfig, port, .. } = given;
    assert_eq!((backend_modes, cluster_id, generate_kubeconfig, port), (Vec::new(), None, None, None));
    assert_eq!(init.given.cluster_id.as_deref(), Some("<your-cluster-id>"));
    assert!(!init.is_check);
}

#[test]
fn what_is_not_given_is_left_to_the_file() {
    let Server { given, sts_cache_ttl, sts_rates, metrics_address, metrics_port, .. } = server("server");

    let Given { address, backend_modes, cluster_id, kubeconfig_pregenerated, port, state_dir, .. } = given;
    assert_eq!(
        (address, cluster_id, kubeconfig_pregenerated, port, state_dir),
        (None, None, None, None, None)
    );
    assert!(backend_modes.is_empty());
    assert_eq!(sts_cache_ttl, Duration::from_mins(1));
    assert_eq!(sts_rates, StsRates { key: 2, known: 60, unknown: 30 });
    assert!(metrics_address.is_loopback());
    assert_eq!(metrics_port, 21363);
}

#[test]
fn flags_for_all_commands_may_stand_before_and_after_them() {
    for line in ["-i c -c f server", "server -i c -c f", "--cluster-id c --config f server"] {
        let given = server(line).given;
        assert_eq!((given.cluster_id.as_deref(), given.config), (Some("c"), Some("f".into())), "{line}");
    }
}

#[test]
fn switches_take_values_with_an_equals_sign_only() {
    assert!(server("server --deny-with-error").deny_with_error);
    assert!(server("server --deny-with-error=T").deny_with_error);
    assert!(!server("server --deny-with-error=false").deny_with_error);
    assert_eq!(server("server --kubeconfig-pregenerated").given.kubeconfig_pregenerated, Some(true));
    assert_eq!(server("server --kubeconfig-pregenerated=0").given.kubeconfig_pregenerated, Some(false));
    assert!(parse("server --deny-with-error maybe").is_err());
    assert!(parse("server --deny-with-error=maybe").is_err());
}

#[test]
fn the_last_flag_of_a_name_counts() {
    assert_eq!(server("server --port 1 --port 2").given.port, Some(2));
}

#[test]
fn a_region_is_the_variables_unless_the_flag_says_another() {
    let region = |line: &str| {
        let args = parse_with(line, &[("STS_REGION", "cn-beijing")]).unwrap();
        match args.command {
            Command::Server(server) => server.given.region,
            Command::Verify(verify) => verify.given.region,
            Command::Token(token) => token.region.map(|region| region.to_string()),
            other => panic!("{other:?}"),
        }
    };

    for line in ["server", "verify -t x", "token -i c"] {
        assert_eq!(region(line).as_deref(), Some("cn-beijing"), "{line}");
        assert_eq!(region(&format!("{line} --region cn-hangzhou")).as_deref(), Some("cn-hangzhou"), "{line}");
    }
    let wrong = parse_with("token -i c", &[("STS_REGION", "x/y")]).unwrap_err();
    assert!(wrong.to_string().starts_with("STS_REGION: "), "{wrong}");
}

#[test]
fn what_has_no_effect_is_noticed() {
    let args = parse_with(
        "server -b 0.0.0.0 --feature-gates RAMIdentityMappingCRD=true",
        &[("STS_MAX_IDLE_CONNS_PER_HOST", "5")],
    );

    assert_eq!(args.unwrap().notices.len(), 3);
    assert!(parse("server").unwrap().notices.is_empty());
}

#[test]
fn init_takes_the_webhook_flags_of_the_server() {
    let line = "--hostname h --address 10.0.0.1 --port 5 --state-dir /s --generate-kubeconfig k \
                --client-certificate c.pem --client-key k.pem";
    let Command::Init(init) = parse(&format!("init --check {line}")).unwrap().command else { panic!() };
    assert!(init.is_check);

    for given in [init.given, server(&format!("server {line}")).given] {
        let Given { hostname, address, port, state_dir, generate_kubeconfig, client_files, .. } = given;
        assert_eq!((hostname.as_deref(), address), (Some("h"), Some("10.0.0.1".parse().unwrap())));
        assert_eq!((port, state_dir), (Some(5), Some("/s".into())));
        assert_eq!(generate_kubeconfig, Some("k".into()));
        assert_eq!(client_files, Some(("c.pem".into(), "k.pem".into())));
    }
    let Command::Init(init) = parse("init --owner 64532").unwrap().command else { panic!() };
    assert_eq!((init.owner, init.is_check), (Some(64532), false));
    assert!(parse("init --client-certificate c.pem").is_err() && parse("server --tls-key k").is_err());
    let tls = server("server --tls-certificate c --tls-key k").tls_files;
    assert_eq!(tls, Some(("c".into(), "k".into())));
}

#[test]
fn add_takes_the_flags_of_ack_ram_authenticators() {
    let add = |line: &str| match parse_with(line, &[("KUBECONFIG", "/env::/other")]).unwrap().command {
        Command::Add(add) => add,
        other => panic!("{other:?}"),
    };
    let user = "add user --userarn acs:ram::1:user/a --username alice --groups dev,ops";

    let plain = add(user);
    assert_eq!((plain.addition.is_role, &*plain.addition.arn), (false, "acs:ram::1:user/a"));
    assert_eq!(
        (&*plain.addition.username, plain.addition.groups),
        ("alice", vec!["dev".into(), "ops".into()])
    );
    assert_eq!((plain.kubeconfigs, plain.context), (vec!["/env".into(), "/other".into()], None));
    assert_eq!((plain.addition.user_id, plain.asks), (None, true));
    let role = add(
        "add role --rolearn r --username x --groups g --userid 1 --kubeconfig k --kubeconfig-context c --prompt=false \
                    --master-url https://api:6443",
    );
    assert!(role.addition.is_role && !role.asks);
    assert_eq!(role.addition.user_id.as_deref(), Some("1"));
    assert_eq!((role.kubeconfigs, role.context.as_deref()), (vec!["k".into()], Some("c")));
    assert_eq!(role.server.unwrap().host(), Some("api"));
    for line in [
        "add",
        "add user --username x --groups g",
        "add user --userarn a --groups g",
        "add user --userarn a --username x",
    ] {
        assert!(matches!(parse(line), Err(ArgsError::Usage(_))), "{line}");
    }
    assert!(
        parse(&format!("{user} --master-url http://api")).is_err(),
        "the token would travel in the clear"
    );
}

#[test]
fn the_probe_asks_where_the_server_answers() {
    let probed = |line: &str| match parse(line).unwrap().command {
        Command::Live { probe_dir } | Command::Ready { probe_dir } => probe_dir,
        other => panic!("{other:?}"),
    };

    for probe in ["live", "ready"] {
        assert_eq!(probed(probe), server("server").probe_dir);
        assert_eq!(probed(&format!("{probe} --probe-dir /p")), server("server --probe-dir /p").probe_dir);
    }
}

#[test]
fn a_token_is_for_a_cluster() {
    let error = parse("token").unwrap_err();
    assert_eq!((error.exit_code(), error.to_string().contains("--cluster-id")), (64, true));

    let token =
        token("token -i c -r acs:ram::1:role/x --api-version v1 -s alice -e xy --cache --profile-name p");

    assert_eq!((&*token.cluster_id, token.api_version), ("c", ApiVersion::V1));
    let role = token.role.unwrap();
    assert_eq!((role.arn.as_str(), role.session.as_str()), ("acs:ram::1:role/x", "alice"));
    assert!(role.external_id.is_some() && token.is_cached && !token.is_bare);
    assert_eq!(token.credentials.profile.as_deref(), Some("p"));
}

#[test]
fn a_token_is_of_what_is_found_unless_it_is_told_otherwise() {
    let plain = token("token -i c");
    assert_eq!((plain.role, plain.api_version), (None, ApiVersion::V1beta1));
    let Credentials { node_role, ignore_environment, ignore_profiles, profile, profile_file } =
        plain.credentials;
    assert!(!node_role && !ignore_environment && !ignore_profiles);
    assert_eq!((profile, profile_file), (None, None));

    for name in ["ecs-role", "imds"] {
        assert!(token(&format!("token -i c --credential-type {name}")).credentials.node_role, "{name}");
    }
    let narrow =
        token("token -i c --ignore-env-credentials --ignore-aliyun-cli-credentials --profile-file f");
    assert!(narrow.credentials.ignore_environment && narrow.credentials.ignore_profiles);
    assert_eq!(narrow.credentials.profile_file, Some("f".into()));
}

#[test]
fn a_session_has_the_variables_name_unless_the_flag_says_another() {
    let session = |line: &str, variable: &str| {
        let args = parse_with(line, &[("ALIBABA_CLOUD_ROLE_SESSION_NAME", variable)]).unwrap();
        let Command::Token(token) = args.command else { panic!() };
        token.role.unwrap().session.as_str().to_owned()
    };

    assert_eq!(session("token -i c -r acs:ram::1:role/x", "alice"), "alice");
    assert_eq!(session("token -i c -r acs:ram::1:role/x", ""), "kube2ram-authenticator");
    assert_eq!(session("token -i c -r acs:ram::1:role/x -s bob", "alice"), "bob");
}

#[test]
fn what_belongs_to_a_role_needs_one() {
    for flag in ["--session-name alice", "--external-id xyz"] {
        assert!(parse(&format!("token -i c {flag}")).is_err(), "{flag}");
        assert!(
            parse(&format!("token -i c -r acs:ram::1:role/x {flag}")).is_ok(),
            "{flag}: the allowed twin"
        );
    }
}

#[test]
fn check_takes_the_mapping_flags_of_the_server() {
    let args = parse("check acs:ram::1:user/a -c f --backend-mode CRD --kubeconfig k --user-id 2 -o json");

    let Command::Check(check) = args.unwrap().command else { panic!() };
    assert_eq!((&*check.arn, check.user_id.as_deref()), ("acs:ram::1:user/a", Some("2")));
    assert_eq!((check.given.backend_modes.len(), check.output), (1, Output::Json));
    assert_eq!(check.given.kubeconfig, Some("k".into()));
}

#[test]
fn values_that_are_none_are_refused() {
    for line in [
        "server --port 0",
        "server --port 65536",
        "server --address localhost",
        "server --sts-cache-ttl 60",
        "server --sts-endpoint http://sts.example.com",
        "server --log-format xml",
        "server --log-level loud",
        "token -i c --region x/y",
        "token -i c -r arn:aws:iam::123456789012:role/x",
        "token -i c -r x",
        "token -i c -r acs:ram::1:role/x -s a:b",
        "nonsense",
        "",
    ] {
        assert!(matches!(parse(line), Err(ArgsError::Usage(_))), "{line}");
    }
    assert_eq!(server("server --sts-cache-ttl 0").sts_cache_ttl, Duration::ZERO);
}

#[test]
fn help_is_no_error_and_an_error_is_one_line() {
    for line in ["--help", "--version", "server --help", "token -h"] {
        let help = parse(line).unwrap_err();
        assert_eq!((help.exit_code(), matches!(help, ArgsError::Help(_))), (0, true), "{line}");
    }
    let error = parse("server --no-such-flag").unwrap_err();
    assert!(!error.to_string().contains('\n') && error.to_string().contains("--no-such-flag"), "{error}");
}
