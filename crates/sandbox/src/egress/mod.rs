//! `network: "egress"`: a job's way out, and no further than the public internet.
//!
//! The way is pasta(1), of Debian's package passt: an ordinary process of an ordinary user that carries what leaves the
//! job's network namespace through sockets of its own, so that neither host nor job needs a privilege for it. In order:
//!
//! 1. A thread enters the host's network namespace (the engine's own has nothing in it) and starts pasta there, as a user
//!    that is nobody else.
//! 2. pasta makes a user namespace and a network namespace in it, and starts a program there, which loads the rules of
//!    [`rules`] into nftables(8), says so, and waits for its stdin to end.
//! 3. The sandbox's init enters that network namespace instead of its own. The job's user namespace is not the one that owns
//!    it, so no capability that a job could have is of any use there.
//!
//! When the job is over, or this process dies, the program's stdin ends, and with the program pasta.

mod rules;

use std::fs::File;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, killpg};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::Pid;

pub use rules::{EgressConfig, EgressRule, EgressRuleError};
use rules::{NAME_SERVER, ruleset};

/// Where programs are looked for.
const PLACES: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
/// tun(4): networking/tuntap.rst of the kernel's documentation.
const TUN: &str = "/dev/net/tun";
/// Who pasta is where this process may choose: a number that distributions give to nobody, and hutch to nothing else.
const PASTA_ID: &str = "65529";
/// What the job's side has: the usual numbers of user-mode networks.
const INSIDE: [&str; 8] = ["-a", "10.0.2.100", "-n", "24", "-g", "10.0.2.2", "-I", "eth0"];
/// No port leads in, and none to this host's own loopback.
const CLOSED: [&str; 9] = ["-t", "none", "-u", "none", "-T", "none", "-U", "none", "--no-map-gw"];
/// What is done inside: the rules are an argument.
const PROGRAM: &str = "nft \"$1\" && echo ready && exec cat";
/// How long it may take on a machine with much to do.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most words of what went wrong that are repeated.
const MOST_WORDS: u64 = 2000;

/// What it takes to give jobs a way out.
#[derive(Debug)]
pub(crate) struct Egress {
    config: EgressConfig,
    /// The host's network namespace, where it is not this process's own.
    host: Option<OwnedFd>,
    pasta: PathBuf,
    setpriv: PathBuf,
    /// A device for pasta, where that of the host is root's alone.
    own_tun: Option<PathBuf>,
}

/// A network namespace with a way out, while this is held.
#[derive(Debug)]
pub(crate) struct WayOut {
    pub(crate) namespace: OwnedFd,
    pasta: Child,
    stdin: Option<ChildStdin>,
}

impl WayOut {
    /// Ends pasta and what it has started.
    fn end(&mut self) {
        drop(self.stdin.take());
        if let Ok(group) = i32::try_from(self.pasta.id()) {
            // It is still a zombie at least, so the number is nobody else's.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
}

impl Drop for WayOut {
    fn drop(&mut self) {
        self.end();
        let _ = self.pasta.wait();
    }
}

impl Egress {
    /// Looks whether jobs can have a way out here.
    ///
    /// # Errors
    /// Why not, in words, with the remedy.
    pub(crate) fn find(config: EgressConfig, host: Option<OwnedFd>, data_dir: &Path) -> Result<Self, String> {
        if !config.enabled {
            return Err("worker.egress.enabled is false".to_owned());
        }
        let pasta = program("pasta", "passt")?;
        program("nft", "nftables")?;
        let setpriv = program("setpriv", "util-linux")?;
        if let Err(error) = File::options().read(true).write(true).open(TUN) {
            return Err(format!(
                "{TUN} cannot be opened ({error}): load the module tun, or hand the device on"
            ));
        }
        let own_tun = own_tun(data_dir).map_err(|e| format!("cannot make a device like {TUN}: {e}"))?;
        Ok(Self { config, host, pasta, setpriv, own_tun })
    }

    /// What goes to `/etc/resolv.conf`: resolv.conf(5).
    pub(crate) fn resolver() -> String {
        format!("nameserver {NAME_SERVER}\n")
    }

    /// Makes a way out. It blocks for some tens of milliseconds.
    ///
    /// # Errors
    /// What could not be done, in words.
    pub(crate) fn open(&self) -> Result<WayOut, String> {
        let host = self.host.as_ref().map(|host| host.try_clone()).transpose().map_err(|e| e.to_string())?;
        std::thread::scope(|scope| {
            // What it enters is this thread's alone, and its children's.
            let thread = scope.spawn(move || {
                if let Some(host) = host {
                    setns(host.as_fd(), CloneFlags::CLONE_NEWNET)
                        .map_err(|e| format!("enter the host's network namespace: {}", e.desc()))?;
                }
                self.show_tun().map_err(|e| format!("show pasta {TUN}: {}", e.desc()))?;
                self.start()
            });
            thread.join().unwrap_or_else(|_| Err("its thread failed".to_owned()))
        })
    }

    /// Shows pasta a device that it may open, where that of the host is root's alone: in a mount namespace that is this
    /// thread's.
    fn show_tun(&self) -> nix::Result<()> {
        let Some(own) = &self.own_tun else { return Ok(()) };
        let nothing = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
        mount(Some(own), TUN, nothing, MsFlags::MS_BIND, nothing)
    }

    fn start(&self) -> Result<WayOut, String> {
        let rules =
            ruleset(&self.config, &own_addresses().map_err(|e| format!("this host's addresses: {e}"))?);
        let mut command = if nix::unistd::geteuid().is_root() {
            let mut command = Command::new(&self.setpriv);
            command.args(["--reuid", PASTA_ID, "--regid", PASTA_ID, "--clear-groups", "--"]).arg(&self.pasta);
            command
        } else {
            Command::new(&self.pasta)
        };
        command
            .args(["--foreground", "--quiet", "--config-net", "--dns-forward", NAME_SERVER])
            .args(INSIDE)
            .args(CLOSED)
            .args(["--", "sh", "-c", PROGRAM, "sh", &rules])
            .env_clear()
            .env("PATH", PLACES.join(":"))
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut pasta = command.spawn().map_err(|e| format!("start pasta: {e}"))?;
        let stdin = pasta.stdin.take();
        // From here on dropping it ends it.
        let mut way =
            WayOut { namespace: File::open("/dev/null").map_err(|e| e.to_string())?.into(), pasta, stdin };
        match ready(&mut way.pasta) {
            Ok(()) => {}
            Err(why) => return Err(format!("pasta: {}", said(&mut way, &why))),
        }
        let inside = child_of(way.pasta.id()).ok_or("pasta has no program")?;
        let path = format!("/proc/{inside}/ns/net");
        way.namespace = File::open(&path).map_err(|e| format!("{path}: {e}"))?.into();
        Ok(way)
    }
}

/// A device like [`TUN`] that everybody may open, unless that is one already.
fn own_tun(data_dir: &Path) -> io::Result<Option<PathBuf>> {
    let there = std::fs::metadata(TUN)?;
    let everybody = 0o666;
    if there.mode() & everybody == everybody || !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    let own = data_dir.join("tun");
    match mknod(&own, SFlag::S_IFCHR, Mode::from_bits_truncate(everybody), there.rdev()) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
        Err(e) => return Err(e.into()),
    }
    // Whatever the umask took away.
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(everybody))?;
    Ok(Some(own))
}

/// Waits until the rules are in force.
fn ready(pasta: &mut Child) -> Result<(), String> {
    let mut stdout = pasta.stdout.take().ok_or("it has no stdout")?;
    let (sender, word) = mpsc::channel();
    // It ends when pasta does.
    std::thread::spawn(move || {
        let mut bytes = [0; 6];
        let _ = sender.send(stdout.read_exact(&mut bytes).map(|()| bytes));
    });
    match word.recv_timeout(PATIENCE) {
        Ok(Ok(bytes)) if &bytes == b"ready\n" => Ok(()),
        Ok(_) => Err("its program did not begin".to_owned()),
        Err(_) => Err(format!("it was not ready in {PATIENCE:?}")),
    }
}

/// What went wrong, with what was said of it.
fn said(way: &mut WayOut, why: &str) -> String {
    way.end();
    let mut words = String::new();
    if let Some(stderr) = way.pasta.stderr.take() {
        let _ = stderr.take(MOST_WORDS).read_to_string(&mut words);
    }
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    if words.is_empty() { why.to_owned() } else { format!("{why}: {words}") }
}

/// The first child of a process.
fn child_of(pid: u32) -> Option<u32> {
    let until = Instant::now() + Duration::from_secs(1);
    loop {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        if let Some(child) = children.split_whitespace().next() {
            return child.parse().ok();
        }
        if Instant::now() > until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Addresses of the network namespace that this thread is in, loopback's left out: they are inside as well.
fn own_addresses() -> io::Result<Vec<IpAddr>> {
    let addresses = nix::ifaddrs::getifaddrs()?.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::from(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::from(address.ip())))
    });
    Ok(addresses.filter(|address| !address.is_loopback()).collect())
}

fn program(name: &str, package: &str) -> Result<PathBuf, String> {
    let found = PLACES.iter().map(|place| Path::new(place).join(name)).find(|path| path.is_file());
    found.ok_or_else(|| format!("{name} is not installed (Debian package {package})"))
}
