//! A stream of bytes as one connection of a pod, against the whole metadata service of each cloud with a real
//! server that records what reaches it. The first byte selects the caller and the splits of the rest.

mod framing;
mod responses;
mod world;

use std::sync::Arc;

use kube2ram_agent::{
    datapath::Origin,
    identity::CgroupId,
    server::{MetadataPolicy, path::Target},
};
use kube2ram_cloud::Cloud;
use kube2ram_service::drain::Drain;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex, split},
    task::yield_now,
};

use self::{
    framing::Framing,
    world::{SECRET, Service, UPSTREAM_BODY},
};
use super::model::{self, Tree};

/// Set in the first byte: no hook has recorded the connection.
const UNVOUCHED: u8 = 1;
/// The operator has opened what is sensitive.
const OPEN: u8 = 2;
/// The stream comes in two parts, the agent having read the first. A TCP segment may end anywhere.
const CUT: u8 = 4;

/// Checks one connection.
pub fn check(data: &[u8]) {
    let Some((&flags, stream)) = data.split_first() else { return };
    for cloud in Cloud::ALL {
        check_on(cloud, flags, stream);
    }
}

fn check_on(cloud: Cloud, flags: u8, stream: &[u8]) {
    let policy = if flags & OPEN == 0 { MetadataPolicy::Standard } else { MetadataPolicy::Open };
    let origin = (flags & UNVOUCHED == 0).then_some(Origin::Task(CgroupId(7)));
    let cut = if flags & CUT == 0 { 0 } else { usize::from(flags >> 3) * stream.len() / 32 };

    let (answer, upstream) =
        world::with_service(cloud, policy, |service| converse(service, stream, cut, origin.clone()));

    let framing = Framing::of(stream);
    let shown = format!("{cloud:?}: {} -> {}", stream.escape_ascii(), answer.escape_ascii());
    let statuses = responses::statuses(&answer, &framing);
    // A request that has two readings, or none, may be answered in one of them or refused; nothing after it
    // is a request.
    let most = framing.requests.len() + usize::from(framing.ends_in_doubt);
    assert!(statuses.len() <= most, "{} responses to {most} requests: {shown}", statuses.len());
    if origin.is_none() {
        assert!(upstream.is_empty(), "an unvouched request passed: {shown}");
        assert!(statuses.len() <= 1 && statuses.iter().all(|status| *status != 200), "{shown}");
        assert!(!contains(&answer, SECRET) && !contains(&answer, "my-role"), "{shown}");
    }
    let passed: Vec<&str> = upstream.iter().map(|bytes| one_request(bytes)).collect();
    let tree = Tree::of(cloud);
    let sensitive = if policy == MetadataPolicy::Open { None } else { Some(tree.sensitive) };
    for target in &passed {
        let is_closed = |items| model::could_mean(target.as_bytes(), items);
        assert!(!is_closed(tree.credentials), "{target} passed: {shown}");
        assert!(!sensitive.is_some_and(is_closed), "{target} passed: {shown}");
    }
    assert!(is_asked_for(&passed, &framing, cloud), "{passed:?} were not asked for: {shown}");
    assert!(
        answer.windows(UPSTREAM_BODY.len()).filter(|w| *w == UPSTREAM_BODY.as_bytes()).count()
            <= passed.len()
    );
}

/// Sends the stream and reads all that comes until the agent closes.
async fn converse(
    service: Arc<Service>,
    stream: &[u8],
    cut: usize,
    origin: Option<Origin>,
) -> (Vec<u8>, Vec<Vec<u8>>) {
    let (client, far) = duplex(16 * 1024);
    let (mut receiver, mut sender) = split(client);
    let drain = Drain::new();
    let serving = Arc::clone(&service.server).serve_stream(far, ([10, 0, 0, 1], 4711).into(), origin, &drain);
    let sending = async {
        let (first, second) = stream.split_at(cut);
        // The agent may have closed.
        if sender.write_all(first).await.is_ok() {
            for _ in 0..4 {
                yield_now().await;
            }
            drop(sender.write_all(second).await);
        }
    };
    let mut answer = Vec::new();
    let receiving = async { drop(receiver.read_to_end(&mut answer).await) };
    tokio::join!(serving, sending, receiving);
    (answer, service.world.take_upstream().await)
}

/// The target of the one request that these bytes are.
fn one_request(bytes: &[u8]) -> &str {
    let framing = Framing::of(bytes);
    assert!(
        framing.requests.len() == 1 && !framing.ends_in_doubt && framing.requests[0].body == 0,
        "not one plain request reached the real server: {}",
        bytes.escape_ascii()
    );
    let head = String::from_utf8_lossy(bytes).to_ascii_lowercase();
    for header in [
        "transfer-encoding",
        "content-length",
        "x-forwarded-for",
        "forwarded",
        "via",
        "upgrade",
        "connection",
    ] {
        assert!(!head.contains(&format!("\r\n{header}:")), "{header} reached the real server: {head}");
    }
    str::from_utf8(framing.requests[0].target).expect("an ASCII target")
}

/// Whether what passed is, in order, what requests of the stream ask for. Of a last one in doubt nothing is
/// known.
fn is_asked_for(passed: &[&str], framing: &Framing<'_>, cloud: Cloud) -> bool {
    let (metadata, dialect) = (Tree::of(cloud).metadata, cloud.dialect());
    let mut asked = framing
        .requests
        .iter()
        .filter_map(|request| Target::parse(&as_the_agent_sees(request.target), metadata, dialect).ok());
    let mut left = passed.iter().skip_while(|passed| {
        let path = passed.split('?').next().unwrap_or_default();
        asked.any(|target| target.path.as_str() == path)
    });
    left.next().is_none() || (framing.ends_in_doubt && left.next().is_none())
}

/// hyper's parser of targets drops a fragment, and gives an absolute one that has no path the path `/` (RFC
/// 3986, 6.2.3).
fn as_the_agent_sees(target: &[u8]) -> Vec<u8> {
    let mut target = target.split(|byte| *byte == b'#').next().unwrap_or_default().to_vec();
    let is_absolute = !target.starts_with(b"/");
    let authority = target.windows(3).position(|bytes| bytes == b"://").map(|at| at + 3);
    if let Some(authority) = authority.filter(|_| is_absolute)
        && let Some(end) = target[authority..].iter().position(|byte| matches!(byte, b'/' | b'?'))
        && target[authority + end] == b'?'
    {
        target.insert(authority + end, b'/');
    }
    target
}

fn contains(text: &[u8], needle: &str) -> bool {
    text.windows(needle.len()).any(|window| window == needle.as_bytes())
}
