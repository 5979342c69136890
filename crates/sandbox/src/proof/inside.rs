//! The program in the sandbox: it tries what no job may, and says of each trial what came of it, a line of JSON for each.
//!
//! What it says is a name and an outcome: what was seen if the sandbox held, or else what got through.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;

use hutch_sandbox_sys::attempt;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::statfs::{PROC_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};

use super::Host;

/// How many processes and threads the job may have, and how many bytes on its disk; each tries to have more.
pub(super) const PROCESSES: usize = 16;
pub(super) const DISK_BYTES: usize = 4 << 20;

/// All that a job finds in its environment.
const ENVIRONMENT: &[&str] = &["HOME", "LANG", "PATH", "USER"];
/// Devices of the host that no job has.
const DEVICES: &[&str] = &[
    "kmsg",
    "mem",
    "kmem",
    "port",
    "sda",
    "vda",
    "nvme0",
    "kvm",
    "fuse",
    "loop-control",
    "loop0",
    "mapper",
    "vhost-net",
];
/// Files of proc(5) that are read-only for jobs, and such that are empty for them.
const READ_ONLY: &[&str] = &["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"];
const EMPTY: &[&str] = &["/proc/kcore", "/proc/keys", "/proc/timer_list"];

type Outcome = Result<String, String>;

/// What the binary does as `probe` with these words; see [`Engine::prove`](crate::Engine::prove).
#[must_use]
pub fn probe(words: &[String]) -> ExitCode {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["attacks", host] => match serde_json::from_str(host) {
            Ok(host) => attacks(&host).map_err(|e| format!("cannot say what was seen: {e}")),
            Err(e) => Err(format!("what is of the host is not readable: {e}")),
        },
        ["memory", bytes] => match bytes.parse() {
            Ok(bytes) => {
                take(bytes);
                Ok(())
            }
            Err(e) => Err(format!("`{bytes}` is no number of bytes: {e}")),
        },
        _ => Err("`probe` is what `hutch doctor` runs in a sandbox, and of no other use".to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            // Whoever reads it has the sandbox's stderr.
            let _ = writeln!(io::stderr(), "{why}");
            ExitCode::FAILURE
        }
    }
}

fn attacks(host: &Host) -> io::Result<()> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let trials: [(&str, Outcome); 13] = [
        ("namespaces", own_namespaces(host)),
        ("processes", processes()),
        ("descriptors", descriptors()),
        ("environment", environment()),
        ("capabilities", capabilities(&status)),
        ("no_new_privileges", no_new_privileges(&status)),
        ("devices", devices()),
        ("proc", proc()),
        ("host_files", host_files(host)),
        ("network", network(host)),
        ("process_limit", process_limit()),
        ("disk_limit", disk_limit()),
        // The last: it may leave this process elsewhere.
        ("system_calls", system_calls()),
    ];
    let mut stdout = io::stdout().lock();
    for trial in &trials {
        serde_json::to_writer(&mut stdout, trial)?;
        stdout.write_all(b"\n")?;
    }
    stdout.flush()
}

/// The namespaces of this process by name: namespaces(7).
pub(super) fn namespaces() -> BTreeMap<String, String> {
    ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]
        .into_iter()
        .filter_map(|name| {
            let place = fs::read_link(Path::new("/proc/self/ns").join(name)).ok()?;
            Some((name.to_owned(), place.to_string_lossy().into_owned()))
        })
        .collect()
}

fn own_namespaces(host: &Host) -> Outcome {
    let own = namespaces();
    let shared: Vec<_> = host
        .namespaces
        .iter()
        .filter(|(name, place)| own.get(*name).is_none_or(|own| own == *place))
        .map(|(name, _)| name.as_str())
        .collect();
    judge(&shared, format!("{} of its own", own.len()), "shared with the host, or not seen")
}

fn processes() -> Outcome {
    let pid = std::process::id();
    let entries = fs::read_dir("/proc").map_err(|e| format!("/proc: {e}"))?;
    let seen =
        entries.flatten().filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok()).count();
    // init, and this one.
    if pid == 1 {
        Err("the program is process 1, to which the kernel drops signals".to_owned())
    } else if seen > 2 {
        Err(format!("{seen} processes are seen, of which 2 are the sandbox's"))
    } else {
        Ok(format!("{seen} are seen"))
    }
}

fn descriptors() -> Outcome {
    let directory = format!("/proc/{}/fd", std::process::id());
    let entries = fs::read_dir("/proc/self/fd").map_err(|e| format!("/proc/self/fd: {e}"))?;
    let leaked: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok_and(|number| number > 2))
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter(|place| *place != Path::new(&directory))
        .map(|place| place.to_string_lossy().into_owned())
        .collect();
    judge(&leaked, "0, 1 and 2 alone".to_owned(), "open")
}

fn environment() -> Outcome {
    let foreign: Vec<_> = std::env::vars_os()
        .map(|(name, _)| name.to_string_lossy().into_owned())
        .filter(|name| !ENVIRONMENT.contains(&name.as_str()))
        .collect();
    judge(&foreign, "what the job says alone".to_owned(), "set")
}

fn capabilities(status: &str) -> Outcome {
    let lines: Vec<_> = status.lines().filter(|line| line.starts_with("Cap")).collect();
    let held: Vec<_> = lines
        .iter()
        .filter(|line| {
            line.bytes()
                .skip_while(|byte| *byte != b':')
                .any(|byte| matches!(byte, b'1'..=b'9' | b'a'..=b'f'))
        })
        .collect();
    if lines.is_empty() {
        Err("they cannot be read".to_owned())
    } else {
        judge(&held, "none".to_owned(), "held")
    }
}

fn no_new_privileges(status: &str) -> Outcome {
    let line =
        status.lines().find(|line| line.starts_with("NoNewPrivs:")).unwrap_or("nothing is known of it");
    if line.ends_with('1') { Ok("set".to_owned()) } else { Err(line.to_owned()) }
}

fn system_calls() -> Outcome {
    let answers = attempt::system_calls();
    let through: Vec<_> =
        answers.iter().filter(|(_, answer)| !attempt::is_refusal(*answer)).map(|(name, _)| *name).collect();
    judge(&through, format!("{} are refused", answers.len()), "let through")
}

fn devices() -> Outcome {
    let mut wrong: Vec<String> =
        DEVICES.iter().map(|name| format!("/dev/{name}")).filter(|path| Path::new(path).exists()).collect();
    let null = fs::symlink_metadata("/dev/null");
    if !null.is_ok_and(|null| null.file_type().is_char_device() && null.rdev() == makedev(1, 3)) {
        wrong.push("a /dev/null that is none".to_owned());
    }
    let node = Path::new("/tmp/proof-device");
    if mknod(node, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, 1)).is_ok() {
        wrong.push("a node that it made".to_owned());
    }
    judge(&wrong, "the sandbox's own, and no new one".to_owned(), "there")
}

fn proc() -> Outcome {
    let mut wrong = Vec::new();
    if !statfs("/proc").is_ok_and(|found| found.filesystem_type() == PROC_SUPER_MAGIC) {
        wrong.push("/proc is no proc".to_owned());
    }
    for path in READ_ONLY {
        if OpenOptions::new().write(true).open(path).is_ok() {
            wrong.push(format!("{path} can be written"));
        }
        let read_only = statvfs(*path).map(|found| found.flags().contains(FsFlags::ST_RDONLY));
        if read_only == Ok(false) {
            wrong.push(format!("{path} is not read-only"));
        }
    }
    for path in EMPTY {
        let mut byte = [0];
        match File::open(path).and_then(|mut file| file.read(&mut byte)) {
            Ok(0) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Ok(_) => wrong.push(format!("{path} can be read")),
            Err(e) => wrong.push(format!("{path} is not masked, but answers {e}")),
        }
    }
    judge(&wrong, "its own, masked, its settings read-only".to_owned(), "found")
}

fn host_files(host: &Host) -> Outcome {
    let mut wrong: Vec<String> = Vec::new();
    if host.directory.symlink_metadata().is_ok() {
        wrong.push(host.directory.display().to_string());
    }
    if fs::read_dir("/sys/fs/cgroup").is_ok_and(|mut entries| entries.next().is_some()) {
        wrong.push("/sys/fs/cgroup".to_owned());
    }
    let flags = statvfs("/").map(|root| root.flags()).unwrap_or(FsFlags::empty());
    for (flag, name) in
        [(FsFlags::ST_NOSUID, "a root without nosuid"), (FsFlags::ST_NODEV, "a root without nodev")]
    {
        if !flags.contains(flag) {
            wrong.push(name.to_owned());
        }
    }
    judge(&wrong, "not there; root is nosuid, nodev".to_owned(), "there")
}

fn network(host: &Host) -> Outcome {
    let table = fs::read_to_string("/proc/self/net/dev").map_err(|e| format!("/proc/self/net/dev: {e}"))?;
    let mut wrong: Vec<String> = table
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim().to_owned())
        .filter(|name| name != "lo")
        .collect();
    let address =
        SocketAddr::from_abstract_name(&host.socket).map_err(|e| format!("{}: {e}", host.socket))?;
    if UnixStream::connect_addr(&address).is_ok() {
        wrong.push("an abstract socket of the host".to_owned());
    }
    let route = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.connect("192.0.2.1:9"));
    if route.is_ok() {
        wrong.push("a way to 192.0.2.1".to_owned());
    }
    judge(&wrong, "lo alone".to_owned(), "there")
}

/// Starts threads until it may not.
fn process_limit() -> Outcome {
    let most = 4 * PROCESSES;
    let mut threads = Vec::new();
    while threads.len() < most {
        let (end, ended) = mpsc::channel::<()>();
        match std::thread::Builder::new().stack_size(64 << 10).spawn(move || ended.recv()) {
            Ok(thread) => threads.push((end, thread)),
            Err(_) => break,
        }
    }
    let started = threads.len();
    for (end, thread) in threads {
        drop(end);
        let _ = thread.join();
    }
    if started < most {
        Ok(format!("{started} threads, no more"))
    } else {
        Err(format!("{started} threads were started"))
    }
}

/// Writes until it may not.
fn disk_limit() -> Outcome {
    let path = Path::new("/tmp/proof-room");
    let bytes = vec![1; 64 << 10];
    let mut written = 0;
    let full = File::create(path).and_then(|mut file| {
        while written < 4 * DISK_BYTES {
            written += file.write(&bytes)?;
        }
        Ok(())
    });
    let _ = fs::remove_file(path);
    match full {
        Err(e) if e.kind() == io::ErrorKind::StorageFull => {
            Ok(format!("{} KiB were written, no more", written >> 10))
        }
        Err(e) => Err(format!("a file cannot be written: {e}")),
        Ok(()) => Err(format!("{} KiB were written", written >> 10)),
    }
}

/// Takes so much memory, and writes to all of it.
fn take(bytes: usize) {
    let mut taken: Vec<Vec<u8>> = Vec::new();
    for _ in 0..bytes >> 20 {
        taken.push(std::hint::black_box(vec![1; 1 << 20]));
    }
    std::hint::black_box(&taken);
}

/// Held, unless something got through.
fn judge<T: AsRef<str>>(through: &[T], held: String, what: &str) -> Outcome {
    if through.is_empty() {
        return Ok(held);
    }
    let names: Vec<_> = through.iter().map(AsRef::as_ref).collect();
    Err(format!("{what}: {}", names.join(", ")))
}
