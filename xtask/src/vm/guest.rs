//! A guest's life: the two shares, qemu, its console, its end.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::kernel::Kernel;

/// qemu's daemon for shared directories.
pub(super) const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// How many lines of the console are shown of a guest that failed before it said anything.
const TAIL: usize = 40;

/// How the line begins by which the guest says that it is up.
const UP: &str = "vm: Linux";

/// The daemon for the host's files, in a mount namespace in which they are read only. `$1` is where its
/// socket is; its own state goes to /run.
const SHARE_HOST: &str = r#"
mount --bind "$1" "$1" && mount -o remount,bind,ro / && mount -t tmpfs run /run || exit
while read -r device dir rest; do
    [ "$dir" = "$1" ] || case $device in /dev/*) mount -o remount,bind,ro "$dir" 2> /dev/null;; esac
done < /proc/self/mounts
shift
exec "$@"
"#;

/// A process that ends with us at the latest.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots the guest and waits until it is off.
///
/// # Errors
/// That it could not be started, did not end in time, or never came up; the end of its console was shown then.
pub(super) fn boot(
    kernel: &Kernel,
    dir: &Path,
    share: &Path,
    patience: Duration,
    shell: bool,
) -> anyhow::Result<()> {
    let sockets = tempdir()?;
    let _host = share_host(&sockets.0, dir)?;
    let _results = share_results(&sockets.0, share, dir)?;
    let disk = dir.join("disk");
    make_disk(&disk)?;
    let mut qemu = qemu(kernel, &sockets.0, &disk);
    qemu.stdin(if shell { Stdio::inherit() } else { Stdio::null() });
    if shell {
        let status = qemu.status().context("start qemu")?;
        return if status.success() { Ok(()) } else { bail!("qemu: {status}") };
    }
    let child = qemu.stdout(Stdio::piped()).spawn().context("start qemu")?;
    let mut qemu = Owned(child);
    let console = qemu.0.stdout.take().context("qemu's console")?;
    let ended = follow(console, patience);
    if ended.is_ok() {
        let status = qemu.0.wait().context("wait for qemu")?;
        if !status.success() {
            bail!("qemu: {status}");
        }
    }
    ended
}

/// Shows what the guest says from its first line on, until it is off.
fn follow(console: ChildStdout, patience: Duration) -> anyhow::Result<()> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while console.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let begun = Instant::now();
    let (mut up, mut done) = (false, false);
    let mut tail = VecDeque::new();
    loop {
        match lines.recv_timeout(patience.saturating_sub(begun.elapsed())) {
            Ok(line) => {
                up |= line.starts_with(UP);
                done |= line == "vm: done";
                if up {
                    let _ = writeln!(std::io::stderr(), "{line}");
                }
                tail.push_back(line);
                if tail.len() > TAIL {
                    tail.pop_front();
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) if done => return Ok(()),
            Err(error) => {
                if !up {
                    let lines: Vec<_> = tail.into_iter().collect();
                    let _ = writeln!(std::io::stderr(), "{}", lines.join("\n"));
                }
                match error {
                    mpsc::RecvTimeoutError::Timeout => {
                        bail!("the guest did not end in {} s", patience.as_secs())
                    }
                    mpsc::RecvTimeoutError::Disconnected => bail!("the guest ended before its work was done"),
                }
            }
        }
    }
}

fn qemu(kernel: &Kernel, sockets: &Path, disk: &Path) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3072"]);
    qemu.args([
        "-object",
        "memory-backend-memfd,id=memory,size=3072M,share=on",
        "-numa",
        "node,memdev=memory",
    ]);
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&kernel.initramfs);
    // A panic ends the guest; v1 is not to be had in it.
    qemu.args(["-append", "console=ttyS0 quiet panic=-1 cgroup_no_v1=all random.trust_cpu=on"]);
    for share in ["host", "results"] {
        let socket = sockets.join(share).join("socket");
        qemu.args(["-chardev", &format!("socket,id={share},path={}", socket.display())]);
        qemu.args(["-device", &format!("vhost-user-fs-pci,chardev={share},tag={share}")]);
    }
    qemu.args(["-drive", &format!("file={},format=raw,if=none,id=disk,cache=unsafe", disk.display())]);
    qemu.args(["-device", "virtio-blk-pci,drive=disk"]);
    qemu
}

fn share_host(sockets: &Path, dir: &Path) -> anyhow::Result<Owned> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", SHARE_HOST, "sh"]).arg(sockets);
    virtiofsd(&mut command, &sockets.join("host"), Path::new("/"), "always", &dir.join("host.log"))
}

fn share_results(sockets: &Path, share: &Path, dir: &Path) -> anyhow::Result<Owned> {
    let mut command = Command::new("env");
    virtiofsd(&mut command, &sockets.join("results"), share, "auto", &dir.join("results.log"))
}

/// Starts a daemon for a shared directory, by a command that execs what it is given, and waits for its socket.
fn virtiofsd(
    by: &mut Command,
    socket: &Path,
    source: &Path,
    cache: &str,
    log: &Path,
) -> anyhow::Result<Owned> {
    fs::create_dir_all(socket).with_context(|| format!("create {}", socket.display()))?;
    let socket = socket.join("socket");
    by.arg(VIRTIOFSD).arg(format!("--socket-path={}", socket.display()));
    by.args([
        "-o",
        "sandbox=chroot",
        "-o",
        &format!("cache={cache}"),
        "-o",
        &format!("source={}", source.display()),
    ]);
    let output = fs::File::create(log).with_context(|| format!("create {}", log.display()))?;
    by.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let mut daemon = Owned(by.spawn().context("start virtiofsd")?);
    let begun = Instant::now();
    while !socket.exists() {
        if daemon.0.try_wait()?.is_some() || begun.elapsed() > Duration::from_secs(30) {
            bail!("virtiofsd: {}", fs::read_to_string(log).unwrap_or_default().trim());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(daemon)
}

/// A sparse disk with an empty ext4.
fn make_disk(disk: &Path) -> anyhow::Result<()> {
    let _ = fs::remove_file(disk);
    let file = fs::File::create(disk).with_context(|| format!("create {}", disk.display()))?;
    file.set_len(8 << 30).context("size the guest's disk")?;
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-E", "lazy_itable_init=1"])
        .arg(disk)
        .status();
    if made.context("start mkfs.ext4")?.success() { Ok(()) } else { bail!("mkfs.ext4 failed") }
}

/// A directory whose path is short, as the path of a socket must be.
struct Sockets(std::path::PathBuf);

impl Drop for Sockets {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tempdir() -> anyhow::Result<Sockets> {
    let path = std::env::temp_dir().join(format!("hutch-vm-{}", std::process::id()));
    fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(Sockets(path))
}
