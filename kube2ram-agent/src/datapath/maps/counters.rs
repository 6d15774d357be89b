//! The counters of the eBPF programs, as a metric. Registered by `app`.

use std::fmt;

use aya::maps::{MapData, PerCpuArray};
use kube2ram_common::{abi::Counter, names::map};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
};

use super::open;
use crate::datapath::{DatapathError, pins::Pins};

/// The counters of the eBPF programs.
pub struct Counters(PerCpuArray<MapData, u64>);

impl Counters {
    pub(in crate::datapath) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        open(pins, map::COUNTERS).map(Self)
    }

    /// Label and value of each, summed over the CPUs; what cannot be read is left out.
    pub fn read(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Counter::ALL.iter().filter_map(|(counter, label)| {
            let values = self.0.get(&(*counter as u32), 0).ok()?;
            Some((*label, values.iter().sum()))
        })
    }
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.read()).finish()
    }
}

impl Collector for Counters {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode_outcomes(self.read(), encoder)
    }
}

fn encode_outcomes(
    outcomes: impl Iterator<Item = (&'static str, u64)>,
    mut encoder: DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let help = "Decisions of the eBPF programs, by outcome.";
    let mut family = encoder.encode_descriptor("kernel_outcomes", help, None, MetricType::Counter)?;
    for (label, value) in outcomes {
        ConstCounter::new(value).encode(family.encode_family(&[("outcome", label)])?)?;
    }
    Ok(())
}

/// As [`Counters`] before anything happened, without a kernel.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct NoOutcomes;

#[cfg(test)]
impl Collector for NoOutcomes {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode_outcomes(Counter::ALL.iter().map(|(_, label)| (*label, 0)), encoder)
    }
}
