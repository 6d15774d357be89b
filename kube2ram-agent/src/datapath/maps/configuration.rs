//! The configuration of the eBPF programs in its map: the pods' cgroups, and the addresses of agent and
//! metadata server. Written by `attach` and `repair`.

use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
};

use aya::maps::{Array, MapData};
use kube2ram_common::{
    abi::{CONFIG_KEEPS_OPEN, Config},
    connection::{addr_be, addr6_be, port_be},
    names::map,
};

use super::{NetnsCookies, open};
use crate::{
    datapath::{AgentAddr, DatapathError, Settings, io_error, pins::Pins},
    identity::{cgroup_id, qos_cgroups},
};

/// The configuration that today's cgroups and these settings ask for.
fn wanted_config(settings: &Settings, agent_netns: u64) -> Result<Config, DatapathError> {
    let Settings { metadata, agent: AgentAddr(agent), pods_cgroup, .. } = settings;
    let examine_error = || io_error("examine", pods_cgroup);
    Ok(Config {
        pods_cgroup: cgroup_id(pods_cgroup).map_err(examine_error())?.0,
        agent_netns,
        qos_cgroups: qos_cgroups(pods_cgroup).map_err(examine_error())?.map(|id| id.map_or(0, |id| id.0)),
        metadata_addr6_be: metadata.v6.map_or([0; 4], addr6_be),
        metadata_addr_be: addr_be(*metadata.v4.ip()),
        agent_addr_be: addr_be(*agent.ip()),
        metadata_port_be: port_be(metadata.v4.port()),
        agent_port_be: port_be(agent.port()),
        flags: if settings.keeps_open { CONFIG_KEEPS_OPEN } else { 0 },
    })
}

/// The configuration of the eBPF programs: node and cloud.
pub(in crate::datapath) struct Configuration {
    map: Array<MapData, Config>,
    agent_netns: u64,
}

impl Configuration {
    pub(in crate::datapath) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self { map: open(pins, map::CONFIG)?, agent_netns: 0 })
    }

    /// Identifies the agent's network namespace, if it is not known yet. Below Linux 5.14 the programs
    /// provide its cookie: those of a previous agent, or this agent's after they are attached.
    pub(in crate::datapath) fn learn_agent_netns(&mut self, pins: &Pins) {
        if self.agent_netns != 0 {
            return;
        }
        let ask = || {
            NetnsCookies::open(pins)
                .map_err(io::Error::other)?
                .of(&UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?)
        };
        match ask() {
            Ok(cookie) => self.agent_netns = cookie,
            // Then a connection of the host's own can be taken for a pod's that has forged the host's
            // address.
            Err(error) => tracing::debug!(%error, "cannot identify the agent's own network namespace"),
        }
    }

    /// Writes the configuration unless the map already has it, and returns whether it did so.
    pub(in crate::datapath) fn ensure(&mut self, settings: &Settings) -> Result<bool, DatapathError> {
        let failed = |what| move |source| DatapathError::Map { what, name: map::CONFIG, source };
        let wanted = wanted_config(settings, self.agent_netns)?;
        if self.map.get(&0, 0).map_err(failed("read"))? == wanted {
            return Ok(false);
        }
        self.map.set(0, wanted, 0).map_err(failed("write"))?;
        Ok(true)
    }
}
