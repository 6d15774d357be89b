//! The metrics of the process, with the names that all clients of Prometheus give them (prometheus.io,
//! "Writing client libraries", "Process metrics"). Read from `/proc/self` at each scrape. Depends on rustix;
//! used through the parent.

use std::{fmt, fs, io, sync::Arc};

use jiff::Timestamp;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use rustix::{
    process::{Resource, getrlimit},
    time::{ClockId, clock_gettime},
};

use kube2ram_service::clock::Clock;

/// Registers them; the registry must have no prefix. To be called when the process starts.
pub(in crate::app) fn register(registry: &mut Registry, clock: &Arc<dyn Clock>) {
    registry.register_collector(Box::new(ThisProcess { started_at: clock.now() }));
}

#[derive(Debug)]
struct ThisProcess {
    started_at: Timestamp,
}

/// The fields of `/proc/self/status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    resident_bytes: u64,
    virtual_bytes: u64,
    threads: u64,
}

impl Collector for ThisProcess {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let cpu = ConstCounter::new(cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9);
        let help = "User and system time of the process's threads.";
        cpu.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, MetricType::Counter)?)?;
        let mut gauge = |name, help, value: f64| {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(metric)
        };
        let started_at = self.started_at.as_duration().as_secs_f64();
        gauge("process_start_time_seconds", "When the process began, in Unix time.", started_at)?;
        if let Some(max) = getrlimit(Resource::Nofile).current {
            gauge("process_max_fds", "How many file descriptors the process may open.", float(max))?;
        }
        if let Ok(open) = open_descriptors() {
            gauge("process_open_fds", "Open file descriptors of the process.", float(open))?;
        }
        // What cannot be read is absent: zero would be made up.
        if let Some(usage) = fs::read_to_string("/proc/self/status").ok().as_deref().and_then(parse) {
            let Usage { resident_bytes, virtual_bytes, threads } = usage;
            gauge("process_resident_memory_bytes", "Resident memory of the process.", float(resident_bytes))?;
            gauge("process_virtual_memory_bytes", "Virtual memory of the process.", float(virtual_bytes))?;
            gauge("process_threads", "Threads of the process.", float(threads))?;
        }
        Ok(())
    }
}

/// Without the one that is open while they are counted.
fn open_descriptors() -> io::Result<u64> {
    let counted = fs::read_dir("/proc/self/fd")?.try_fold(0_u64, |count, entry| entry.map(|_| count + 1))?;
    Ok(counted.saturating_sub(1))
}

/// Lines such as `VmRSS:  5120 kB` and `Threads:  7`, with tabs (man 5 proc_pid_status).
fn parse(status: &str) -> Option<Usage> {
    let number = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some(Usage {
        resident_bytes: number("VmRSS")? * 1024,
        virtual_bytes: number("VmSize")? * 1024,
        threads: number("Threads")?,
    })
}

fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube2ram_service::{admin::Exposition, clock::SystemClock};

    #[test]
    fn reads_what_the_kernel_writes_and_nothing_that_it_does_not() {
        let status = "Name:\tkube2ram\nVmSize:\t  204800 kB\nVmRSS:\t   20480 kB\nThreads:\t9\n";

        let usage = Usage { resident_bytes: 20 << 20, virtual_bytes: 200 << 20, threads: 9 };
        assert_eq!(parse(status), Some(usage));
        for broken in ["", "VmRSS: 1 kB\nVmSize: x kB\nThreads: 1\n", "VmRSS: 1 kB\nThreads: 1\n"] {
            assert_eq!(parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn reads_this_process() {
        let mut registry = Registry::default();
        register(&mut registry, &(Arc::new(SystemClock) as Arc<dyn Clock>));
        let read = || {
            let text = Exposition::Text.encode(&registry).unwrap();
            move |name: &str| -> f64 {
                let sample = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
                sample.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
            }
        };
        let before = read();
        let files: Vec<_> = (0..10).map(|_| fs::File::open("/proc/self/status").unwrap()).collect();
        let memory = vec![1_u8; 32 << 20];
        let mut spent = 0_u64;
        while read()("process_cpu_seconds_total") <= before("process_cpu_seconds_total") {
            spent += 1;
        }

        let after = read();

        assert!(spent < 1_000_000 && memory.iter().all(|byte| *byte == 1));
        assert!(after("process_open_fds") >= before("process_open_fds") + 10.0);
        drop(files);
        assert!(after("process_max_fds") >= after("process_open_fds"));
        let grown = after("process_resident_memory_bytes") - before("process_resident_memory_bytes");
        assert!(grown > f64::from(16 << 20), "{grown}");
        assert!(after("process_virtual_memory_bytes") > after("process_resident_memory_bytes"));
        assert!(after("process_threads") >= 1.0);
        let now = SystemClock.now().as_duration().as_secs_f64();
        assert!((now - after("process_start_time_seconds")).abs() < 60.0);
    }
}
