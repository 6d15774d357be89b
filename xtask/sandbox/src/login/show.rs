//! The shop window of the authenticator: users, roles and intruders log in with kubectl, next to who they
//! should become. Depends on the parent. Called by the binary's `logins`, which
//! `cargo xtask sandbox --authenticator` runs.

use std::{
    io::Write,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{Cluster, Programs, UNAUTHORIZED, tampered, token_of};
use crate::{
    say,
    show::mark,
    standin::{AccessKey, Accounts, StsMode},
};

/// Makes the cluster, lets everybody log in, and prints the table to `out`. Returns the cluster, and whether
/// everything was as it should be.
///
/// # Errors
/// When the cluster cannot be made.
pub fn show(programs: Programs, directory: &Path, out: &mut dyn Write) -> Result<(Cluster, bool)> {
    let started = Instant::now();
    say("starting etcd, kube-apiserver, the authenticator and a stand-in of STS");
    let cluster = Cluster::start(programs, directory, &["--authentication-token-webhook-version=v1"])?;
    say(&format!("ready after {:.0?}; logging in with kubectl", started.elapsed()));
    let mut table = Table { out, is_right: true };
    table.row("WHO", "BECOMES", "GROUPS", None)?;
    let [alice, bob, carol] = ["alice", "bob", "carol"].map(|name| cluster.accounts.add_user(name));
    mapped(&cluster, &mut table, &alice, &carol)?;
    intruders(&cluster, &mut table, &alice, &bob)?;
    outage(&cluster, &mut table)?;
    let is_right = table.is_right;
    let calls = cluster.sts.calls().len();
    writeln!(out, "STS: {calls} calls; {:.1?} in all", started.elapsed())?;
    Ok((cluster, is_right))
}

fn mapped(cluster: &Cluster, table: &mut Table<'_>, alice: &AccessKey, carol: &AccessKey) -> Result<()> {
    table.expect("user alice, by the configuration file", cluster.login(alice, &[]), Some("alice"))?;
    table.expect("user carol, by the ConfigMap", cluster.login(carol, &[]), Some("carol"))?;
    let session = format!("ram:{}:alice-laptop", Accounts::UID);
    let assume = cluster.assume("dev-orders", "alice@laptop");
    let role = cluster.login(alice, &assume.each_ref().map(String::as_str));
    table.expect("role dev-orders, by a RAMIdentityMapping", role, Some(&session))?;
    let issued = cluster.accounts.add_session("dev-orders", "alice@laptop");
    let token = token_of(Cluster::ID, &issued, Timestamp::now());
    table.expect("the same, in ack-ram-tool's form", cluster.login_with(&token), Some(&session))
}

fn intruders(cluster: &Cluster, table: &mut Table<'_>, alice: &AccessKey, bob: &AccessKey) -> Result<()> {
    let now = Timestamp::now();
    let genuine = token_of(Cluster::ID, alice, now);
    let guessed = AccessKey { secret: "guessed".into(), ..alice.clone() };
    let billing = cluster.accounts.add_session("billing", "alice");
    let old = now - SignedDuration::from_mins(16);
    for (who, token) in [
        ("user bob, who is not mapped", token_of(Cluster::ID, bob, now)),
        ("role billing, which is not mapped", token_of(Cluster::ID, &billing, now)),
        ("alice's token of another cluster", token_of("another-cluster", alice, now)),
        ("alice's token, replayed after its window", token_of(Cluster::ID, alice, old)),
        ("alice's key with a guessed secret", token_of(Cluster::ID, &guessed, now)),
        ("alice's token under bob's key", tampered(&genuine, &alice.id, &bob.id)?),
        ("alice's token for another action", tampered(&genuine, "GetCallerIdentity", "AssumeRole")?),
        ("a token of another issuer", "eyJhbGciOiJSUzI1NiJ9.e30.c2ln".to_owned()),
    ] {
        table.expect(who, cluster.login_with(&token), None)?;
    }
    Ok(())
}

/// STS answers again after the API server's second question.
fn outage(cluster: &Cluster, table: &mut Table<'_>) -> Result<()> {
    // A token that the API server does not know yet.
    let key = cluster.accounts.add_session("dev-orders", "erin");
    let token = token_of(Cluster::ID, &key, Timestamp::now());
    cluster.sts.set_mode(StsMode::Unavailable)?;
    let mut waiting =
        cluster.begin_login(&cluster.write_kubeconfig("waiting.kubeconfig", &json!({ "token": token }))?)?;
    while cluster.logins("sts_unavailable")? < 2 {
        ensure!(!waiting.has_ended()?, "kubectl did not wait: {:?}", waiting.user());
        thread::sleep(Duration::from_millis(100));
    }
    cluster.sts.set_mode(StsMode::Ok)?;
    let session = format!("ram:{}:erin", Accounts::UID);
    table.expect("role dev-orders, STS failed twice", waiting.user(), Some(&session))
}

struct Table<'a> {
    out: &'a mut dyn Write,
    is_right: bool,
}

impl Table<'_> {
    /// A login, and the username that it should have, or none.
    fn expect(&mut self, who: &str, login: Result<Value>, username: Option<&str>) -> Result<()> {
        let (becomes, groups, is_right) = match login {
            Ok(user) => {
                let groups: Vec<_> =
                    user["groups"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                let name = user["username"].as_str().unwrap_or_default();
                (name.to_owned(), groups.join(", "), username == Some(name))
            }
            Err(error) => {
                let text = error.to_string();
                let is_denied = text.contains(UNAUTHORIZED);
                let becomes = if is_denied { "401 Unauthorized".to_owned() } else { text };
                (becomes, String::new(), is_denied && username.is_none())
            }
        };
        self.is_right &= is_right;
        self.row(who, &becomes, &groups, Some(is_right))
    }

    fn row(&mut self, who: &str, becomes: &str, groups: &str, is_right: Option<bool>) -> Result<()> {
        let mark = is_right.map_or(" ".to_owned(), |is_right| mark(is_right).to_string());
        let line = format!("{mark} {who:<42}{becomes:<36}{groups}");
        Ok(writeln!(self.out, "{}", line.trim_end())?)
    }
}
