//! `kube2ram status`: every part's state, in one document. Called by the parent.

use std::{collections::BTreeMap, process};

use super::{Operator, pod_name, rounded};
use crate::{
    args::{Config, CredentialsFrom, Source},
    boot_guard::installation_failure,
    credentials::{Attempt, Failure},
    datapath::{self, Mode},
    kubernetes::{OwnNode, Presence, Resource, TokenRequester, TokenState},
    preflight::cilium_warning,
    status::{
        Agent, ApiServer, BaseCredentials, BootGuard, Datapath, ForwardGuard, Interception, MetadataServer,
        Pod, Program, Repair, SCHEMA, ServiceAccounts, Status, Sts, StsFailure, Watch, WireGuard,
        problems_of,
    },
};
use kube2ram_cloud::BaseState;

impl Operator {
    pub(super) async fn status(&self) -> Status {
        let pods = self.pods().await;
        let mut status = Status {
            schema: SCHEMA,
            at: self.now(),
            agent: self.agent(),
            problems: Vec::new(),
            datapath: self.datapath(),
            forward_guard: self.forward_guard(),
            wire_guard: self.wire_guard(),
            boot_guard: self.boot_guard(),
            api_server: self.api_server(),
            metadata_server: self.metadata_server(),
            service_accounts: self.service_accounts(&pods),
            base_credentials: self.base_credentials(),
            sts: self.sts(),
            pods,
        };
        status.problems = problems_of(&status);
        status
    }

    fn agent(&self) -> Agent {
        let (level, until) = self.log_level.read();
        Agent {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.config.node.clone(),
            pid: process::id(),
            started_at: self.ago(self.started.elapsed()),
            is_draining: self.drain.accepting().is_cancelled(),
            pending: self.readiness.pending().into_iter().map(Into::into).collect(),
            log_level: level.to_string(),
            log_level_until: until.map(rounded),
            taken_ports: self
                .ports
                .iter()
                .filter_map(|port| port.taken(|uid| pod_name(&self.cluster, uid)))
                .collect(),
            hints: hints(&self.config).into_iter().chain(self.cilium_warning()).collect(),
        }
    }

    /// A hint and no problem: whether Cilium's version is one that fails is not visible here.
    fn cilium_warning(&self) -> Option<String> {
        cilium_warning(&self.settings.bpf_dir, &self.settings.cgroup_root)
    }

    fn datapath(&self) -> Datapath {
        let look = self.kernel.state.read();
        let last = self.kernel.self_test.last();
        let program = |(name, cgroup): (&'static str, std::path::PathBuf)| Program {
            name: name.to_owned(),
            cgroup: cgroup.display().to_string(),
        };
        Datapath {
            is_in_force: look.at.is_some() && look.failures.is_empty(),
            mode: if look.mode == Some(Mode::Root) { "root" } else { "pods" }.to_owned(),
            pods_cgroup: self.settings.pods_cgroup.display().to_string(),
            checked_at: look.at.map(|at| self.ago(at.elapsed())),
            failures: look.failures,
            programs: look.programs.into_iter().map(program).collect(),
            repairs: look.repairs.iter().map(|(drift, count)| (drift.label().to_owned(), *count)).collect(),
            last_repair: look.last_repair.map(|(drift, of, at)| Repair {
                at: self.ago(at.elapsed()),
                kind: drift.label().to_owned(),
                of: of.to_owned(),
            }),
            outside_pods: self.outside.read(),
            outcomes: self.kernel.counters.read().map(|(name, count)| (name.to_owned(), count)).collect(),
            interception: Interception {
                arrived_at: last.arrived_at.map(|at| self.ago(at.elapsed())),
                failure: last.failure,
            },
        }
    }

    fn forward_guard(&self) -> ForwardGuard {
        let standing = self.kernel.guard.as_ref().map(|guard| guard.read());
        let is_wanted = standing.is_some();
        let standing = standing.unwrap_or_default();
        ForwardGuard {
            is_wanted,
            is_in_force: standing.is_active == Some(true),
            has_ipv6: standing.has_ipv6,
            has_ipvs: standing.has_ipvs,
            repairs: standing.repairs,
            failure: standing.failure,
        }
    }

    fn wire_guard(&self) -> WireGuard {
        let Some(standing) = self.kernel.wire_guard.as_ref().map(|guard| guard.read()) else {
            return WireGuard::default();
        };
        WireGuard {
            is_wanted: true,
            is_in_force: standing.is_active == Some(true),
            node_devices: standing.node_devices,
            pod_devices: standing.pod_devices,
            repairs: standing.repairs,
            failure: standing.failure,
        }
    }

    fn boot_guard(&self) -> BootGuard {
        let state = match datapath::boot_guard(&self.settings.bpf_dir) {
            Ok(datapath::BootGuard::Absent) => "absent",
            Ok(datapath::BootGuard::Active { .. }) => "in_force",
            Ok(datapath::BootGuard::TakenOver) => "taken_over",
            Err(_) => "unknown",
        };
        BootGuard {
            state: state.to_owned(),
            installation_failure: installation_failure(&self.config.pod_dir),
        }
    }

    fn api_server(&self) -> ApiServer {
        let watch = |resource: Resource| {
            let state = self.cluster.watch_state(resource);
            let lag = state.failing.as_ref().and(state.answered).unwrap_or_default();
            let (since, failure) = state.failing.unzip();
            Watch {
                resource: resource.as_str().to_owned(),
                heard_at: state.answered.map(|at| self.ago(at)),
                failing_since: since.map(|since| self.ago(since)),
                lag_seconds: lag.as_secs(),
                failure: failure.map(Into::into),
            }
        };
        let restored = |presence| presence == Presence::Restored;
        ApiServer {
            address: self.cluster.address().to_owned(),
            is_synced: self.cluster.is_synced(),
            restored_pods: self.cluster.pod_views().iter().filter(|view| restored(view.presence)).count(),
            watches: self.cluster.resources().iter().copied().map(watch).collect(),
        }
    }

    fn metadata_server(&self) -> MetadataServer {
        let reading = self.activity.read();
        let failing = reading.failing.as_ref();
        MetadataServer {
            address: self.config.metadata.to_string(),
            answered_at: reading.answered.map(|answered| self.ago(answered)),
            failing_since: failing.map(|failing| self.ago(failing.since)),
            failed_at: failing.map(|failing| self.ago(failing.last)),
            failure: failing.map(|failing| failing.error.to_string()),
        }
    }

    fn service_accounts(&self, pods: &[Pod]) -> ServiceAccounts {
        let TokenState { requester, failure, own_node, accounts_failure } = self.cluster.token_state();
        let (token_failed_at, token_failure) = failure.unzip();
        let (read_failed_at, read_failure) = accounts_failure.unzip();
        let requester = requester.map(|requester| match requester {
            TokenRequester::Agent => "agent",
            TokenRequester::Node => "node",
        });
        let mut counted = BTreeMap::<_, usize>::new();
        for from in pods.iter().filter_map(|pod| pod.role_from) {
            *counted.entry(from).or_default() += 1;
        }
        let (own_token, own_token_node) = match own_node {
            OwnNode::Bound => ("this_node", None),
            OwnNode::NotBound => ("no_node", None),
            OwnNode::Other(node) => ("other_node", Some(node.into())),
            OwnNode::Unknown => ("unknown", None),
        };
        ServiceAccounts {
            credentials_from: self.config.credentials_from.as_str().to_owned(),
            are_read: self.config.reads_service_accounts,
            read_failed_at: read_failed_at.map(rounded),
            read_failure: read_failure.map(Into::into),
            token_requester: requester.map(str::to_owned),
            own_token: own_token.to_owned(),
            own_token_node,
            token_failed_at: token_failed_at.map(rounded),
            token_failure: token_failure.map(Into::into),
            pods: counted,
        }
    }

    fn base_credentials(&self) -> BaseCredentials {
        let roles = self.entitlements.get().map(|entitlements| &entitlements.roles);
        let account = roles.and_then(|roles| roles.base()).map(|base| base.account().to_owned());
        if self.config.credentials_from == CredentialsFrom::ServiceAccount {
            let source = "unused".to_owned();
            return BaseCredentials { source, account, ..BaseCredentials::default() };
        }
        let BaseState { source, role, expires_at, failure } = self.base.state();
        let (failed_at, failure) = failure.unzip();
        BaseCredentials {
            source: source.as_str().to_owned(),
            role: role.map(Into::into),
            account,
            expires_at,
            failed_at: failed_at.map(rounded),
            failure: failure.map(Into::into),
        }
    }

    fn sts(&self) -> Sts {
        let issues = self.entitlements.get().map(|entitlements| entitlements.credentials.issues());
        let can_issue = issues.is_some();
        let dialect = self.config.cloud.dialect();
        let advice = match self.config.credentials_from {
            CredentialsFrom::Node => dialect.advice,
            CredentialsFrom::ServiceAccount => dialect.exchange_advice,
        };
        let issues = issues.unwrap_or_default();
        Sts {
            can_issue,
            is_throttled: issues.is_throttled,
            queued: issues.queued,
            sessions: issues.sessions,
            succeeded_at: issues.succeeded.map(|success| rounded(success.outcome)),
            last_failure: issues.failed.map(|Attempt { role, outcome }| {
                let Failure { at, kind, code, message, request_id } = outcome;
                StsFailure {
                    at: rounded(at),
                    kind: kind.as_str().to_owned(),
                    remedy: advice(kind).to_owned(),
                    code: code.into(),
                    message,
                    request_id: request_id.map(Into::into),
                    role: role.to_string(),
                }
            }),
        }
    }
}

/// What the flags leave open. docs/migration.md closes it in its last step.
fn hints(config: &Config) -> Vec<String> {
    let role = match &config.default_role {
        Source::Discover => {
            Some("pods without an annotation get the node's own role (--auto-discover-default-role)")
        }
        Source::Given(_) | Source::Unset => None,
    };
    // A role that trusts a ServiceAccount names its namespace.
    let trusts_node = config.credentials_from == CredentialsFrom::Node;
    let restrictions = (trusts_node && config.namespace_restrictions.is_none())
        .then_some("any namespace may use any role (no --namespace-restrictions)");
    role.into_iter().chain(restrictions).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;

    fn hinted(flags: &[&str]) -> Vec<String> {
        let args = ["kube2ram", "--node=n"].iter().chain(flags).map(Into::into);
        match Command::from_args(args, &|_| None).unwrap() {
            Command::Agent(config) => hints(&config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn hints_last_until_a_migration_is_completed() {
        let restricted = "--namespace-restrictions";

        assert_eq!(hinted(&["--auto-discover-default-role"]).len(), 2);
        assert!(hinted(&["--auto-discover-default-role", restricted])[0].contains("the node's own role"));
        assert!(hinted(&["--auto-discover-base-arn"])[0].contains("any namespace"));
        assert!(hinted(&["--auto-discover-base-arn", restricted]).is_empty());
        let by_account = ["--cloud=aws", "--credentials-from=service-account"];
        assert!(hinted(&by_account).is_empty(), "the roles' trust policies restrict namespaces");
    }
}
