//! `kube2ram explain --access-key-id`: from the agent's memory, else from the audit file. Called by the
//! parent.

use jiff::Timestamp;
use tokio::task::spawn_blocking;

use super::Operator;
use crate::{
    audit::{self, Event, Record},
    status::{AccessKeyReport, Holder, IssuedSession, SCHEMA, Source},
};
use kube2ram_service::telemetry::chain;

impl Operator {
    /// # Errors
    /// When the file cannot be read.
    pub(super) async fn explain_access_key(&self, access_key_id: String) -> Result<AccessKeyReport, String> {
        let has_file = self.trail.file().is_some();
        let records = self.trail.remembered(&access_key_id);
        if !records.is_empty() {
            return Ok(report(self.now(), access_key_id, &records, Source::Memory, has_file));
        }
        let Some(path) = self.trail.file() else {
            return Ok(report(self.now(), access_key_id, &[], Source::File, has_file));
        };
        let (path, id) = (path.to_owned(), access_key_id.clone());
        let found = spawn_blocking(move || audit::find(&path, &id)).await;
        let found = found.map_err(|error| format!("cannot search the audit file: {error}"))?;
        let failure = found.failure.map(|error| format!("cannot search the audit file: {}", chain(&error)));
        let mut told = report(self.now(), access_key_id, &found.records, Source::File, has_file);
        match failure {
            Some(failure) if found.records.is_empty() => return Err(failure),
            Some(failure) => told.remedy = Some(format!("{failure}; then ask again")),
            None => {}
        }
        Ok(told)
    }
}

/// The document of some records of one session.
fn report(
    at: Timestamp,
    access_key_id: String,
    records: &[Record],
    source: Source,
    has_file: bool,
) -> AccessKeyReport {
    let issued = records.iter().find(|record| record.event == Event::Issued);
    let pods: Vec<_> = records.iter().filter(|record| record.event != Event::Issued).map(holder).collect();
    let has_more = records.iter().any(|record| record.event == Event::NotRecorded);
    let session = issued.or(records.first()).map(|record| IssuedSession {
        role: record.role.to_string(),
        session: record.session.to_string(),
        grant: record.grant.as_str().to_owned(),
        request_id: record.request_id.as_deref().map(ToOwned::to_owned),
        node: record.node.to_string(),
        issued_at: issued.map(|record| record.at),
        expires_at: record.expires_at,
        fetched_for: issued.map(holder),
    });
    // The agent whose memory has the session gave out its credentials. A file may lack records.
    let is_complete = session.is_some() && source == Source::Memory && !has_more;
    let (summary, remedy) = match &session {
        None => ("this agent knows no session with this AccessKeyId".to_owned(), Some(elsewhere(has_file))),
        Some(IssuedSession { role, .. }) if is_complete => (given(role, pods.len()), None),
        Some(IssuedSession { role, .. }) => (possibly_given(role, pods.len()), Some(others(has_more))),
    };
    AccessKeyReport {
        schema: SCHEMA,
        at,
        access_key_id,
        source: session.is_some().then_some(source),
        session,
        pods,
        is_complete,
        summary,
        remedy,
    }
}

fn given(role: &str, pods: usize) -> String {
    match pods {
        0 => format!("no pod was given these credentials of {role}: they were fetched ahead"),
        1 => format!("one pod was given these credentials of {role}"),
        count => {
            format!(
                "{count} pods were given these credentials of {role}: each of them can have made the call"
            )
        }
    }
}

fn possibly_given(role: &str, pods: usize) -> String {
    match pods {
        0 => format!(
            "no record names a pod that was given these credentials of {role}, but records can be missing"
        ),
        1 => format!(
            "one pod was given these credentials of {role}, and possibly others: each of them can have made the call"
        ),
        count => format!(
            "{count} pods and possibly others were given these credentials of {role}: each of them can have made the call"
        ),
    }
}

/// Where other pods of a session are found.
fn others(has_more: bool) -> String {
    if has_more {
        "consider every pod of this node that uses this session: only its first 256 pods are recorded"
            .to_owned()
    } else {
        "search the log archive for access_key_id: the file lacks records that were lost, or were in a file before these two".to_owned()
    }
}

/// Where a session is found that this agent does not know.
fn elsewhere(has_file: bool) -> String {
    if has_file {
        "check that the AccessKeyId is complete; then search the audit files of the other nodes, or the log archive for access_key_id".to_owned()
    } else {
        "check that the AccessKeyId is complete; then ask the agents of the other nodes, or search the log archive for access_key_id; --audit-file keeps records on the node".to_owned()
    }
}

fn holder(record: &Record) -> Holder {
    let text = |text: &Option<Box<str>>| text.as_deref().map(ToOwned::to_owned);
    let pod = &record.pod;
    Holder {
        namespace: text(&pod.namespace),
        name: text(&pod.name),
        uid: pod.uid.to_string(),
        service_account: text(&pod.service_account),
        at: record.at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(event: &str, pod: &str) -> Record {
        let text = format!(
            r#"{{"at":"2026-11-21T12:00:00Z","event":"{event}","node":"node-1","access_key_id":"STS.1","request_id":"R-1","role":"acs:ram::1:role/a","session":"shop.web","grant":"service_account","service_account":"shop/web","pod.namespace":"shop","pod.name":"{pod}","pod.uid":"00000000-0000-4000-8000-000000000001","expires_at":"2026-11-21T13:00:00Z"}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn report(records: &[Record]) -> AccessKeyReport {
        of(Source::Memory, records)
    }

    fn of(source: Source, records: &[Record]) -> AccessKeyReport {
        super::report(Timestamp::UNIX_EPOCH, "STS.1".to_owned(), records, source, true)
    }

    #[test]
    fn the_pods_are_those_that_were_given_the_credentials() {
        let told =
            report(&[record("issued", "web-0"), record("delivered", "web-1"), record("delivered", "web-2")]);

        let names: Vec<_> = told.pods.iter().map(|pod| pod.name.as_deref().unwrap()).collect();
        assert_eq!(names, ["web-1", "web-2"]);
        let session = told.session.as_ref().unwrap();
        assert_eq!(session.fetched_for.as_ref().unwrap().name.as_deref(), Some("web-0"));
        assert_eq!(
            (session.grant.as_str(), session.issued_at),
            ("service_account", Some(session.fetched_for.as_ref().unwrap().at))
        );
        assert_eq!((told.source, told.exit_code()), (Some(Source::Memory), 0));
        assert!(told.is_complete && told.remedy.is_none(), "{told:?}");
    }

    #[test]
    fn what_can_lack_records_never_states_that_no_other_pod_has_the_credentials() {
        let (issued, first) = (record("issued", "web-0"), record("delivered", "web-1"));
        let beyond = record("not_recorded", "web-2");
        for (source, records, pods, summary) in [
            (Source::File, &[issued.clone()][..], 0, "records can be missing"),
            (
                Source::File,
                &[issued.clone(), first.clone()],
                1,
                "one pod was given these credentials of acs:ram::1:role/a, and possibly others",
            ),
            (Source::File, &[first.clone(), first.clone()], 2, "2 pods and possibly others"),
            (Source::Memory, &[issued, first, beyond], 2, "2 pods and possibly others"),
        ] {
            let told = of(source, records);

            assert!(
                told.summary.contains(summary) && !told.summary.contains("no pod was"),
                "{}",
                told.summary
            );
            assert_eq!((told.pods.len(), told.is_complete, told.exit_code()), (pods, false, 0));
            assert!(told.remedy.is_some(), "{summary}");
        }
    }

    #[test]
    fn a_delivery_alone_has_its_session_and_fetched_ahead_has_no_pod() {
        let delivered = report(&[record("delivered", "web-1")]);
        let ahead = report(&[record("issued", "web-0")]);

        let session = delivered.session.unwrap();
        assert_eq!((session.role.as_str(), session.issued_at), ("acs:ram::1:role/a", None));
        assert_eq!((delivered.pods.len(), ahead.pods.len(), ahead.exit_code()), (1, 0, 0));
        assert!(ahead.summary.contains("fetched ahead"), "{}", ahead.summary);
    }

    #[test]
    fn an_unknown_key_is_no_success_and_has_a_remedy() {
        let told = report(&[]);

        assert_eq!((told.exit_code(), told.source, told.session.is_none()), (66, None, true));
        assert!(told.remedy.unwrap().contains("other nodes"));
    }
}
