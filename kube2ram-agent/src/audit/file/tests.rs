use std::{
    os::unix::fs::{PermissionsExt as _, symlink},
    thread,
};

use super::*;

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap().lines().map(ToOwned::to_owned).collect()
}

#[test]
fn what_others_could_read_or_write_or_point_elsewhere_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let append = |name: &str| AuditFile::new(path(name), 1000).append(b"{}\n");
    append("file").unwrap();
    symlink(path("file"), path("link")).unwrap();
    symlink(path("nothing"), path("dangling")).unwrap();
    fs::create_dir(path("directory")).unwrap();
    for (name, mode) in [("readable", 0o640), ("writable", 0o602)] {
        fs::write(path(name), "").unwrap();
        fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    for name in ["link", "dangling", "directory", "missing/file"] {
        assert!(matches!(append(name), Err(FileError::Io { .. })), "{name}");
    }
    for name in ["readable", "writable"] {
        assert!(matches!(append(name), Err(FileError::Unsafe(_))), "{name}");
    }
    assert!(!path("nothing").exists());
    assert_eq!(lines(&path("file")), ["{}"]);
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(append("file"), Err(FileError::Directory(_))));
}

#[test]
fn a_full_file_is_renamed_and_one_former_file_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit");
    let mut file = AuditFile::new(path.clone(), 100);

    for n in 0..8 {
        file.append(format!("{n:029}\n").as_bytes()).unwrap();
    }

    let numbers = |path: &Path| lines(path).iter().map(|line| line.parse().unwrap()).collect::<Vec<u32>>();
    assert_eq!(numbers(&path), [6, 7]);
    assert_eq!(numbers(&directory.path().join("audit.1")), [3, 4, 5]);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
}

#[test]
fn two_agents_append_and_rename_without_losing_or_mixing_a_line() {
    const LINES: usize = 2000;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit");
    // Renamed once: each of the files has room for more than half of the lines.
    let limit = 2 * LINES as u64 * 40 * 3 / 4;

    thread::scope(|scope| {
        for agent in 0..2 {
            let path = path.clone();
            scope.spawn(move || {
                let mut file = AuditFile::new(path, limit);
                for n in 0..LINES {
                    file.append(format!("{:039}\n", n * 2 + agent).as_bytes()).unwrap();
                }
            });
        }
    });

    let mut all = lines(&path);
    all.extend(lines(&directory.path().join("audit.1")));
    all.retain(|line| !line.is_empty());
    let mut numbers: Vec<usize> = all.iter().map(|line| line.parse().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..2 * LINES).collect::<Vec<_>>());
}

#[test]
fn a_foreign_lock_lets_the_file_grow_to_twice_its_size_and_no_further() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit");
    let mut file = AuditFile::new(path.clone(), 100);
    file.append(format!("{:089}\n", 0).as_bytes()).unwrap();
    let foreign = File::open(&path).unwrap();
    flock(&foreign, FlockOperation::NonBlockingLockExclusive).unwrap();

    let grown = (0..20).map_while(|_| file.append(b"012345678\n").ok()).count();

    assert_eq!((grown, fs::metadata(&path).unwrap().len()), (11, 200));
    assert!(matches!(file.append(b"x\n"), Err(FileError::Locked(_))));
    drop(foreign);
    file.append(b"again\n").unwrap();
    assert_eq!(lines(&path), ["again"]);
}

#[test]
fn a_record_after_one_that_was_cut_begins_on_its_own_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("audit");
    let mut file = AuditFile::new(path.clone(), 1000);
    file.append(b"{\"cut").unwrap();

    AuditFile::new(path.clone(), 1000).append(b"{}\n").unwrap();

    assert_eq!(lines(&path), ["{\"cut", "{}"]);
    let mut other = AuditFile::new(path.clone(), 1000);
    other.append(b"{\"cut").unwrap();
    file.append(b"{}\n").unwrap();
    assert_eq!(lines(&path)[2..], ["{\"cut", "{}"], "also by the node's other agent");
}
