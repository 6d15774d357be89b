//! No core dumps: the process holds every pod's credentials, and a dump would put them on the host's disk.
//! Called by `main`.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Has the kernel write no core dump of this process. Programs that it starts are not concerned.
///
/// The limit alone is not enough: it does not hold where `core_pattern` is a pipe (systemd-coredump, apport).
/// Root with `CAP_SYS_PTRACE` still may read the memory, as a debugger does.
///
/// # Errors
/// When the kernel refuses, which it has no reason to.
pub fn forbid() -> io::Result<()> {
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _, os::fd::AsRawFd as _};

    use rustix::process::{dumpable_behavior, getrlimit};

    use super::*;

    #[test]
    fn neither_a_file_nor_a_pipe_gets_a_dump_and_descriptors_still_have_paths() {
        forbid().unwrap();

        assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        let limit = getrlimit(Resource::Core);
        assert_eq!((limit.current, limit.maximum), (Some(0), Some(0)));
        // Sockets in the state directory are dialled by such a path.
        let file = File::open("Cargo.toml").unwrap();
        let mut text = String::new();
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap().read_to_string(&mut text).unwrap();
        assert!(text.contains("kube2ram-service"));
    }
}
