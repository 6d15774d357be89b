//! Pod template → the runtime's configuration (OCI runtime specification 1.0), with what kubelet and
//! containerd add. Writes the files that the kubelet writes for a pod. Called by the parent.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Image, Surroundings, create_directories, seccomp, write};

const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

pub(super) fn of(
    template: &Value,
    container: &Value,
    image: &Image,
    node: &Surroundings,
    bundle: &Path,
) -> Result<Value> {
    let security = &container["securityContext"];
    let is_privileged = security["privileged"] == true;
    // containerd confines no privileged container.
    let (masked, read_only): (&[&str], &[&str]) =
        if is_privileged { (&[], &[]) } else { (&MASKED, &READ_ONLY) };
    let capabilities = capabilities(security)?;
    let env = environment(container, node)?;
    let mut args = match container["command"].as_array() {
        Some(command) => words(command)?,
        None => vec![image.entrypoint.clone()],
    };
    args.extend(words(container["args"].as_array().map_or(&[], Vec::as_slice))?);
    for arg in &mut args {
        *arg = expanded(arg, &env);
    }
    let mut namespaces =
        vec![json!({ "type": "mount" }), json!({ "type": "ipc" }), json!({ "type": "cgroup" })];
    for (flag, kind) in [("hostPID", "pid"), ("hostNetwork", "network"), ("hostNetwork", "uts")] {
        if template[flag] != true {
            namespaces.push(json!({ "type": kind }));
        }
    }
    let seccomp = match setting(template, container, "seccompProfile")["type"].as_str() {
        Some("RuntimeDefault") if !is_privileged => seccomp::runtime_default(&capabilities)?,
        None | Some("RuntimeDefault" | "Unconfined") => Value::Null,
        Some(other) => bail!("unknown seccomp profile {other}"),
    };
    let mut config = json!({
        "ociVersion": "1.0.0",
        "process": {
            "terminal": false, "user": user(template, container)?, "cwd": "/", "args": args,
            "env": env.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>(),
            "noNewPrivileges": security["allowPrivilegeEscalation"] == false,
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
        },
        "root": { "path": image.root, "readonly": security["readOnlyRootFilesystem"] == true },
        "mounts": mounts(template, container, node, bundle)?,
        "linux": {
            "namespaces": namespaces,
            "maskedPaths": masked, "readonlyPaths": read_only,
        },
    });
    if !seccomp.is_null() {
        config["linux"]["seccomp"] = seccomp;
    }
    Ok(config)
}

/// containerd's defaults for containers that are not privileged.
const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A setting of the container's security context, or else of the pod's.
fn setting<'a>(template: &'a Value, container: &'a Value, name: &str) -> &'a Value {
    match &container["securityContext"][name] {
        Value::Null => &template["securityContext"][name],
        own => own,
    }
}

/// The user and the group; without a setting it is root here, whatever the image has.
fn user(template: &Value, container: &Value) -> Result<Value> {
    let id = |name: &str| setting(template, container, name).as_u64().unwrap_or(0);
    let (uid, gid) = (id("runAsUser"), id("runAsGroup"));
    let is_root_refused = *setting(template, container, "runAsNonRoot") == true;
    ensure!(uid != 0 || !is_root_refused, "container has runAsNonRoot and image will run as root");
    Ok(json!({ "uid": uid, "gid": gid }))
}

/// All, by their numbers in linux/capability.h.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
/// containerd's for containers whose manifest drops none.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// A privileged container has all. It stays in a cgroup namespace here, and its /sys read-only: the agent's
/// container mounts the host's cgroups itself, and the agent writes to no file of /sys.
fn capabilities(security: &Value) -> Result<Vec<String>> {
    let list = |kind: &str| words(security["capabilities"][kind].as_array().map_or(&[], Vec::as_slice));
    let (dropped, added) = (list("drop")?, list("add")?);
    ensure!(dropped.is_empty() || dropped == ["ALL"], "only some capabilities are dropped");
    if let Some(unknown) = added.iter().find(|name| !CAPABILITIES.contains(&name.as_str())) {
        bail!("no capability {unknown}");
    }
    let is_kept =
        |name: &str| security["privileged"] == true || (dropped.is_empty() && DEFAULT.contains(&name));
    let held = held()?;
    let given = CAPABILITIES.iter().enumerate().filter(|&(number, &name)| {
        let is_held = held >> number & 1 == 1;
        let is_added = added.iter().any(|added| added == name);
        // A machine without CAP_SYS_RESOURCE can run containers that need it only on older kernels.
        (is_added && (is_held || name != "SYS_RESOURCE")) || (is_held && is_kept(name))
    });
    Ok(given.map(|(_, name)| format!("CAP_{name}")).collect())
}

/// The capabilities that this process has, and can give.
fn held() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    Ok(u64::from_str_radix(line.context("no CapEff in /proc/self/status")?.trim(), 16)?)
}

fn environment(container: &Value, node: &Surroundings) -> Result<Vec<(String, String)>> {
    let (host, port) = &node.api_server;
    let mut env: Vec<(String, String)> = [
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOSTNAME", "node"),
        ("KUBERNETES_SERVICE_HOST", host),
        ("KUBERNETES_SERVICE_PORT", &port.to_string()),
        ("KUBERNETES_SERVICE_PORT_HTTPS", &port.to_string()),
        ("KUBERNETES_PORT", &format!("tcp://{host}:{port}")),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    for variable in container["env"].as_array().into_iter().flatten() {
        let name = variable["name"].as_str().context("a variable without a name")?;
        let value = match (&variable["value"], variable["valueFrom"]["fieldRef"]["fieldPath"].as_str()) {
            (Value::String(value), None) => expanded(value, &env),
            (Value::Null, Some(field)) => {
                node.fields.get(field).with_context(|| format!("no field {field}"))?.clone()
            }
            _ => bail!("cannot tell the value of {name}"),
        };
        // As the kubelet (`makeEnvironmentVariables`): a container's own variable stands for that of a
        // Service.
        env.retain(|(known, _)| known != name);
        env.push((name.to_owned(), value));
    }
    Ok(env)
}

/// `$(NAME)` of what is known; what is not stays as it is written.
fn expanded(text: &str, env: &[(String, String)]) -> String {
    env.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("$({name})"), value))
}

fn words(values: &[Value]) -> Result<Vec<String>> {
    values.iter().map(|value| Ok(value.as_str().context("no string")?.to_owned())).collect()
}

fn mounts(template: &Value, container: &Value, node: &Surroundings, bundle: &Path) -> Result<Vec<Value>> {
    let of_kind = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let mut mounts = vec![
        of_kind("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        of_kind("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        of_kind("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        of_kind("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        of_kind("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        // Of the cgroup namespace: the container's own.
        of_kind("/sys/fs/cgroup", "cgroup2", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    let resolv_conf = resolv_conf(template, node)?;
    for (destination, text) in [
        ("/etc/hosts", &node.hosts),
        ("/etc/hostname", &"node\n".to_owned()),
        ("/etc/resolv.conf", &resolv_conf),
    ] {
        let file = bundle.join(destination.trim_start_matches("/etc/"));
        write(&file, text)?;
        mounts.push(bind(&file, destination, true));
    }
    let account = bundle.join("serviceaccount");
    write_all(&account, &node.service_account)?;
    mounts.push(bind(&account, SERVICE_ACCOUNT, true));
    for mount in container["volumeMounts"].as_array().into_iter().flatten() {
        let (name, path) = (&mount["name"], mount["mountPath"].as_str().context("a mount without a path")?);
        let volume =
            template["volumes"].as_array().into_iter().flatten().find(|volume| &volume["name"] == name);
        let source = source(volume.with_context(|| format!("no volume {name}"))?, node, bundle)?;
        mounts.push(bind(&source, path, mount["readOnly"] == true));
    }
    Ok(mounts)
}

/// The node's own, with the options of the pod's `dnsConfig`, as the kubelet writes them.
fn resolv_conf(template: &Value, node: &Surroundings) -> Result<String> {
    let policy = template["dnsPolicy"].as_str().unwrap_or("ClusterFirst");
    // The kubelet (`getPodDNSType`): a pod in the host's network has the node's name servers by either.
    let is_of_node = policy == "Default" || (policy == "ClusterFirst" && template["hostNetwork"] == true);
    ensure!(is_of_node, "the pod asks the cluster's name server");
    let mut text = node.resolv_conf.clone();
    let options = template["dnsConfig"]["options"].as_array().map_or(&[][..], Vec::as_slice);
    for option in options {
        let name = option["name"].as_str().context("an option without a name")?;
        let value = option["value"].as_str().map(|value| format!(":{value}")).unwrap_or_default();
        text.push_str(&format!("options {name}{value}\n"));
    }
    Ok(text)
}

fn bind(source: &Path, destination: &str, read_only: bool) -> Value {
    let access = if read_only { "ro" } else { "rw" };
    json!({ "destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", access] })
}

/// Where a volume is on this machine, created according to its type.
fn source(volume: &Value, node: &Surroundings, bundle: &Path) -> Result<PathBuf> {
    if let Some(path) = volume["hostPath"]["path"].as_str() {
        let kind = volume["hostPath"]["type"].as_str().unwrap_or_default();
        let found =
            node.host_paths.get(Path::new(path)).with_context(|| format!("the host has no {path}"))?;
        if kind == "DirectoryOrCreate" && !found.exists() {
            create_directories(found, found)?;
        }
        ensure!(found.is_dir(), "hostPath type check failed: {path} is not a directory");
        // As crun is shown it.
        let below = found.strip_prefix("/sys/fs/cgroup/unified");
        return Ok(below.map_or_else(|_| found.clone(), |below| Path::new("/sys/fs/cgroup").join(below)));
    }
    if volume["emptyDir"].is_object() {
        // One for all containers of the pod that are made of this bundle's template: a bundle is a pod here.
        let directory = bundle.join(volume["name"].as_str().unwrap_or("empty"));
        fs::create_dir_all(&directory)?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777))?;
        return Ok(directory);
    }
    if let Some(name) = volume["configMap"]["name"].as_str() {
        let data = node.config_maps.get(name).with_context(|| format!("configmap {name:?} not found"))?;
        let directory = bundle.join(volume["name"].as_str().unwrap_or("config-map"));
        write_all(&directory, data)?;
        return Ok(directory);
    }
    let mut files = std::collections::BTreeMap::new();
    for source in volume["projected"]["sources"].as_array().context("an unknown kind of volume")? {
        let token = &source["serviceAccountToken"];
        let (audience, path) = (token["audience"].as_str().unwrap_or_default(), token["path"].as_str());
        let token = node.tokens.get(audience).with_context(|| format!("no token for {audience:?}"))?;
        files.insert(path.context("a token without a path")?.to_owned(), token.clone());
    }
    let directory = bundle.join(volume["name"].as_str().unwrap_or("projected"));
    write_all(&directory, &files)?;
    Ok(directory)
}

fn write_all(directory: &Path, files: &std::collections::BTreeMap<String, String>) -> Result<()> {
    create_directories(directory, directory)?;
    for (name, text) in files {
        write(&directory.join(name), text)?;
    }
    Ok(())
}
