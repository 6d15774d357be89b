//! Devices of the node on which a program decides where a pod's packets go, before netfilter sees them:
//! Terway's DataPath V2, Cilium. Such a program can bypass the node's network stack; whether it does is not
//! known. Depends on `netlink` and `datapath`; called by `devices`.

use std::{collections::BTreeSet, io};

use rustix::net::{AddressFamily, SocketType, netdevice::index_to_name, socket};

use crate::{
    datapath::has_ingress_programs,
    netlink::{Message, Socket, attribute, word},
};

/// Those of the `devices`, by their index in the calling thread's network namespace, that have such programs.
///
/// # Errors
/// As [`Socket::request`].
pub(crate) fn programmed(devices: &BTreeSet<u32>) -> io::Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    if devices.is_empty() {
        return Ok(found);
    }
    let all = Message::dump(RTM_GETQDISC, vec![0; TCMSG], Vec::new());
    Socket::open(None, MAX_DATAGRAMS)?
        .request(&[all], |kind, payload| found.extend(classified(kind, payload)))?;
    found.retain(|index| devices.contains(index));
    let names = socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    for index in devices {
        // A device without a name was removed.
        if !found.contains(index)
            && index_to_name(&names, *index).is_ok_and(|name| has_ingress_programs(&name))
        {
            found.insert(*index);
        }
    }
    Ok(found)
}

/// A queueing discipline takes some 100 bytes, of 32 KiB each; a node may have thousands of devices.
const MAX_DATAGRAMS: usize = 256;
/// `struct tcmsg`.
const TCMSG: usize = 20;
const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;
const TCA_KIND: u16 = 1;

/// The device that has the queueing discipline by which programs are attached before 6.6, and after.
fn classified(kind: u16, payload: &[u8]) -> Option<u32> {
    let head = payload.first_chunk::<TCMSG>().filter(|_| kind == RTM_NEWQDISC)?;
    (attribute(&payload[TCMSG..], TCA_KIND)? == b"clsact\0").then(|| word(head, 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(index: u32, kind: &[u8]) -> Vec<u8> {
        let mut payload = vec![0; TCMSG];
        payload[4..8].copy_from_slice(&index.to_ne_bytes());
        payload.extend(u16::try_from(4 + kind.len()).unwrap().to_ne_bytes());
        payload.extend(TCA_KIND.to_ne_bytes());
        payload.extend(kind);
        payload
    }

    #[test]
    fn reads_which_device_has_the_discipline_for_programs() {
        let clsact = told(7, b"clsact\0");

        assert_eq!(classified(RTM_NEWQDISC, &clsact), Some(7));
        assert_eq!(classified(RTM_NEWQDISC, &told(7, b"noqueue\0")), None);
        assert_eq!(classified(RTM_GETQDISC, &clsact), None);
        for length in 0..clsact.len() {
            assert_eq!(classified(RTM_NEWQDISC, &clsact[..length]), None, "{length}");
        }
    }

    #[test]
    fn the_kernel_is_asked_for_no_device_and_for_one_that_is_not_there() {
        assert_eq!(programmed(&BTreeSet::new()).unwrap(), BTreeSet::new());
        assert_eq!(programmed(&[u32::MAX >> 1].into()).unwrap(), BTreeSet::new());
    }
}
