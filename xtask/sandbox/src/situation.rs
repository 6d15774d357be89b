//! What an operator may find on a node, and how each of it comes about: one source for the tests of `kube2ram
//! status`, Events, alerts and the dashboard. Depends on `sandbox`. Called by tests.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Result, ensure};

use crate::{
    Sandbox,
    client::Reply,
    node::PodSpec,
    standin::{Role, StsMode},
};

/// A state of the node and of what it talks to.
///
/// ```no_run
/// # use kube2ram_sandbox::{Sandbox, situation::Situation};
/// # fn main() -> anyhow::Result<()> {
/// let mut sandbox = Sandbox::create("denied")?;
/// Situation::set_the_stage(&mut sandbox)?;
/// sandbox.start_agent("target/debug/kube2ram".as_ref(), Situation::FLAGS)?;
/// Situation::RoleDenied.bring_about(&mut sandbox)?;
/// Situation::RoleDenied.go_on(&mut sandbox)?; // as often as it takes
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Situation {
    /// Pods get what they ask for.
    AllWell,
    /// The API server refuses connections, and a pod starts that the agent has not heard of.
    ApiServerAway,
    /// The node's role has no valid credentials, so that the agent cannot sign; a pod starts whose
    /// credentials are not cached.
    BaseCredentialsExpired,
    /// Somebody keeps detaching one of the agent's programs.
    Drift,
    /// A pod asks for the role that its annotation names, which its namespace does not allow.
    RoleDenied,
    /// The account's calls to STS are used up; a pod starts whose credentials are not cached.
    StsThrottling,
}

/// The annotation of namespaces that lists the roles of their pods, but for the cloud's prefix.
const ALLOW_LIST: &str = "allowed-roles";

impl Situation {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::AllWell,
        Self::ApiServerAway,
        Self::BaseCredentialsExpired,
        Self::Drift,
        Self::RoleDenied,
        Self::StsThrottling,
    ];

    /// The flags of the agent.
    pub const FLAGS: &[&str] = &["--auto-discover-base-arn", "--namespace-restrictions"];

    /// The namespace of every pod here.
    pub const NAMESPACE: &str = "shop";

    /// A pod with the role `orders-role`, which is there from the beginning, and gets it whatever happens.
    pub const ORDERS: &str = "orders";

    /// Its name, which suits a sandbox.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllWell => "all-well",
            Self::ApiServerAway => "api-server-away",
            Self::BaseCredentialsExpired => "base-expired",
            Self::Drift => "drift",
            Self::RoleDenied => "role-denied",
            Self::StsThrottling => "sts-throttling",
        }
    }

    /// The pod that suffers, which [`Self::bring_about`] makes, and its role.
    pub fn victim(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::AllWell | Self::Drift => None,
            Self::ApiServerAway => Some(("unheard", "late-role")),
            Self::BaseCredentialsExpired | Self::StsThrottling => Some(("late", "late-role")),
            Self::RoleDenied => Some(("intruder", "admin-role")),
        }
    }

    /// Makes what is there before any of it: roles, a namespace with an allow-list, and [`Self::ORDERS`]. To
    /// be called before the agent starts.
    ///
    /// # Errors
    /// As [`Sandbox::add_pod`].
    pub fn set_the_stage(sandbox: &mut Sandbox) -> Result<()> {
        let cloud = sandbox.cloud();
        for role in ["admin-role", "late-role", "orders-role"] {
            sandbox.accounts().add_role(cloud.role_arn(role), Role::default());
        }
        let key = cloud.annotation(ALLOW_LIST);
        let allowed = [(&*key, r#"["late-role", "orders-role"]"#)];
        sandbox.api().apply_namespace(Self::NAMESPACE, &allowed)?;
        sandbox.add_pod(&PodSpec::new(Self::ORDERS).namespace(Self::NAMESPACE).role("orders-role"))
    }

    /// Makes it so. The agent runs, and [`Self::ORDERS`] gets its credentials first.
    ///
    /// # Errors
    /// When the machine refuses, or the agent serves nobody.
    pub fn bring_about(self, sandbox: &mut Sandbox) -> Result<()> {
        ask_for_own(sandbox)?;
        match self {
            Self::AllWell | Self::RoleDenied => {}
            Self::ApiServerAway => sandbox.api().down(),
            Self::BaseCredentialsExpired => sandbox.metadata().expire(),
            Self::Drift => detach(sandbox)?,
            Self::StsThrottling => sandbox.sts().set_mode(StsMode::Throttle)?,
        }
        if let Some((pod, role)) = self.victim() {
            sandbox.add_pod(&PodSpec::new(pod).namespace(Self::NAMESPACE).role(role))?;
        }
        self.go_on(sandbox)
    }

    /// One round of what happens while it lasts: pods ask, somebody meddles. Alerts that look for repetition
    /// need many rounds.
    ///
    /// # Errors
    /// When a pod is not answered as it should be: [`Self::ORDERS`] with its credentials, the victim with 403
    /// or 503.
    pub fn go_on(self, sandbox: &mut Sandbox) -> Result<()> {
        ask_for_own(sandbox)?;
        if self == Self::Drift {
            detach(sandbox)?;
        }
        let Some((pod, role)) = self.victim() else { return Ok(()) };
        let status = ask(sandbox, pod, &format!("{}{role}", sandbox.cloud().list()))?.status;
        let expected = if self == Self::RoleDenied { 403 } else { 503 };
        ensure!(status == expected, "{pod} was answered {status} instead of {expected}");
        Ok(())
    }

    /// Ends it. The victim stays.
    ///
    /// # Errors
    /// When a stand-in cannot listen again.
    pub fn end(self, sandbox: &mut Sandbox) -> Result<()> {
        match self {
            Self::AllWell | Self::Drift => {}
            Self::ApiServerAway => sandbox.api().up()?,
            Self::BaseCredentialsExpired => sandbox.metadata().rotate(),
            Self::RoleDenied => {
                let key = sandbox.cloud().annotation(ALLOW_LIST);
                let allowed = [(&*key, r#"["admin-role", "late-role", "orders-role"]"#)];
                sandbox.api().apply_namespace(Self::NAMESPACE, &allowed)?;
            }
            Self::StsThrottling => sandbox.sts().set_mode(StsMode::Ok)?,
        }
        Ok(())
    }
}

fn ask(sandbox: &Sandbox, pod: &str, target: &str) -> Result<Reply> {
    sandbox.pod(pod)?.curl(target)
}

/// What an SDK asks for, and what the rest of a pod might.
fn ask_for_own(sandbox: &Sandbox) -> Result<()> {
    let list = sandbox.cloud().list();
    for target in [list, &format!("{list}orders-role"), "/latest/meta-data/instance-id"] {
        let reply = ask(sandbox, Situation::ORDERS, target)?;
        ensure!(reply.status == 200, "{target} was answered {}: {}", reply.status, reply.body);
    }
    Ok(())
}

/// Takes the program off the pods' cgroup that drops what no other one has seen. The agent attaches it again
/// within a second, on a link of another id.
fn detach(sandbox: &Sandbox) -> Result<()> {
    let layouts = fs::read_dir(sandbox.node().bpffs().join("kube2ram"))?;
    let layouts = layouts.collect::<Result<Vec<_>, _>>()?;
    let pins: Vec<PathBuf> = layouts
        .iter()
        .map(|layout| layout.path().join("links/pods/k2r_egress"))
        .filter(|pin| pin.exists())
        .collect();
    // None while the agent replaces it, and the link may be the one that was detached before.
    let Some(pin) = pins.first() else { return Ok(()) };
    Command::new("bpftool").args(["link", "detach", "pinned"]).arg(pin).output()?;
    Ok(())
}
