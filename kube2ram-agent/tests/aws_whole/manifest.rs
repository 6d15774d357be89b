//! The arguments and variables of kube2iam's published manifests start the agent under the name of kube2iam.
//! The manifests have no `command`: a user adds `command: [/kube2iam]`, or the variable `KUBE2RAM_CLOUD=aws`.

use std::os::unix::fs::symlink;

use kube2ram_sandbox::{
    Cloud,
    node::PodSpec,
    standin::{Accounts, Role},
};

use crate::support::{AGENT, INSTANCE_ID, LIST, Lab, pod, role_arn};

/// The arguments of the manifest in kube2iam's README, and of its variant for clusters that discover
/// everything. `--app-port`, `--host-ip=$(HOST_IP)` and `--node=$(NODE_NAME)` are the sandbox's own.
const MANIFESTS: [&[&str]; 2] = [
    &["--base-role-arn=arn:aws:iam::123456789012:role/", "--iptables=true", "--host-interface=docker0"],
    &[
        "--auto-discover-base-arn",
        "--auto-discover-default-role=true",
        "--iptables=true",
        "--host-interface=eni+",
        "--use-regional-sts-endpoint",
    ],
];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_published_manifests_of_kube2iam_start_it_as_they_stand() {
    for args in MANIFESTS {
        let mut lab = Lab::new("aws-kube2iam", &[pod("orders"), PodSpec::new("plain")]);
        lab.accounts().add_role(role_arn(Accounts::NODE_ROLE), Role::default());
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("kube2iam");
        // As the image has it.
        symlink(AGENT, &program).unwrap();
        let agent = lab.add_agent(&program, args).unwrap();
        agent.remove_flag("--cloud");
        agent.set_env("AWS_REGION", Cloud::Aws.region());

        agent.start().unwrap();

        assert_eq!(lab.ask("orders", LIST).body, "orders-role", "{args:?}");
        assert_eq!(lab.credentials("orders", "orders-role"), "orders-role", "{args:?}");
        assert_eq!(lab.credentials("orders", Accounts::NODE_ROLE), "403", "{args:?}");
        let own_keys = format!("{LIST}{}", Accounts::NODE_ROLE);
        if args.contains(&"--auto-discover-default-role=true") {
            // By a session of its own.
            assert_eq!(lab.ask("plain", LIST).body, Accounts::NODE_ROLE, "{args:?}");
            let caller = lab.caller(&lab.ask_until_ready("plain", &own_keys));
            let session = format!("assumed-role/{}/default.default", Accounts::NODE_ROLE);
            assert!(caller.ends_with(&session), "{args:?}: not the node's key: {caller}");
        } else {
            assert_eq!(lab.ask("plain", LIST).status, 404, "{args:?}");
            assert_eq!(lab.ask("plain", &own_keys).status, 404, "{args:?}");
        }
        assert_eq!(lab.ask("orders", INSTANCE_ID).body, Cloud::Aws.instance_id(), "{args:?}");
        // A region need not be asked for.
        let calls = lab.sts().calls();
        assert!(calls.iter().all(|call| call.outcome == "OK"), "{calls:?}");
        let log = lab.agent().unwrap().log();
        for flag in ["--iptables has no effect", "--host-interface has no effect"] {
            assert_eq!(log.matches(flag).count(), 1, "{log}");
        }
        assert_eq!(lab.leaks(), []);
        assert!(lab.agent().unwrap().terminate().unwrap().success());
    }
}
