//! The host's own programs and libraries, to be shared copy-on-write.
//!
//! A bind mount would be writable or useless, `/` cannot be stacked below an upper of the same file
//! system, and overlayfs does not see what is mounted below a lower directory. So the bottom is a skeleton:
//! a directory of our own with the links of `/`, empty places, and what of `/etc` programs need;
//! and each tree of programs (`/usr`, and `/bin` and so on where they are not links) gets an
//! overlay of its own on top of it. Homes, secrets, sockets and other mounts are in neither.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown, lchown, symlink};
use std::path::{Path, PathBuf};

/// Top-level directories of programs and libraries: hier(7).
const TREES: &[&str] = &["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"];

/// What programs need of `/etc`: the loader's cache, alternatives, certificates, names of protocols,
/// time zone, and settings of shells and languages. Nothing that says who the host is or lets one in.
const ETC: &[&str] = &[
    "alternatives",
    "bash.bashrc",
    "ca-certificates",
    "ca-certificates.conf",
    "crypto-policies",
    "debian_version",
    "default/locale",
    "ethertypes",
    "fonts",
    "gai.conf",
    "inputrc",
    "java",
    "java-11-openjdk",
    "java-17-openjdk",
    "java-21-openjdk",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "lsb-release",
    "magic",
    "magic.mime",
    "mime.types",
    "nanorc",
    "networks",
    "os-release",
    "perl",
    "pki/tls/certs",
    "profile",
    "protocols",
    "python3",
    "python3.10",
    "python3.11",
    "python3.12",
    "python3.13",
    "rpc",
    "services",
    "shells",
    "skel",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "timezone",
    "xattr.conf",
];

/// Empty places of the skeleton: path, mode.
const PLACES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("media", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("srv", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("var", 0o755),
    ("var/cache", 0o755),
    ("var/lib", 0o755),
    ("var/local", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];

const NSSWITCH: &str = "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\n\
                        protocols: files\nservices: files\nrpc: files\n";
const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";
/// The uid, gid and home of the user that jobs run as by default.
const JOB_ID: u32 = 1001;
const MAX_COPY_BYTES: u64 = 16 << 20;
const MAX_ENTRIES: usize = 20_000;

/// The host layer of this host.
#[derive(Debug)]
pub(crate) struct HostLayer {
    /// The bottom directory.
    pub(crate) skeleton: PathBuf,
    /// Trees that get an overlay of their own: `/usr`, …
    pub(crate) trees: Vec<String>,
}

impl HostLayer {
    /// Finds the trees, and makes the skeleton below `dir` unless an equal one is there.
    pub(crate) fn make(dir: &Path) -> io::Result<Self> {
        let trees = TREES
            .iter()
            .filter(|name| fs::symlink_metadata(Path::new("/").join(name)).is_ok_and(|meta| meta.is_dir()))
            .map(|name| format!("/{name}"))
            .collect();
        let skeleton = dir.join(format!("skeleton-{}", fingerprint()));
        if !skeleton.exists() {
            let draft = dir.join(format!("draft-{}", std::process::id()));
            let _ = fs::remove_dir_all(&draft);
            build(&draft)?;
            match fs::rename(&draft, &skeleton) {
                // Another process was quicker.
                Err(_) if skeleton.exists() => fs::remove_dir_all(&draft)?,
                other => other?,
            }
        }
        Ok(Self { skeleton, trees })
    }
}

/// Changes when the skeleton should: this program's version, and what was copied.
fn fingerprint() -> String {
    use sha2::{Digest as _, Sha256};
    let mut hash = Sha256::new();
    hash.update(env!("CARGO_PKG_VERSION"));
    let watched = ETC.iter().map(|name| Path::new("/etc").join(name));
    let watched = watched.chain(["/etc/passwd".into(), "/etc/group".into()]);
    let tops = TREES.iter().map(|name| Path::new("/").join(name));
    for path in watched.chain(tops) {
        if let Ok(meta) = fs::symlink_metadata(&path) {
            hash.update(path.as_os_str().as_encoded_bytes());
            if !TREES.iter().any(|tree| Path::new("/").join(tree) == path) {
                hash.update(meta.mtime().to_le_bytes());
                hash.update(meta.mtime_nsec().to_le_bytes());
            }
            hash.update(meta.mode().to_le_bytes());
        }
    }
    hex::encode(&hash.finalize()[..8])
}

fn build(root: &Path) -> io::Result<()> {
    make_dir(root, 0o755)?;
    for (place, mode) in PLACES {
        make_dir(&root.join(place), *mode)?;
    }
    for name in TREES {
        let host = Path::new("/").join(name);
        match fs::symlink_metadata(&host) {
            Ok(meta) if meta.is_symlink() => symlink(fs::read_link(&host)?, root.join(name))?,
            Ok(meta) if meta.is_dir() => make_dir(&root.join(name), 0o755)?,
            _ => {}
        }
    }
    symlink("/run", root.join("var/run"))?;
    let mut left = MAX_ENTRIES;
    for name in ETC {
        copy(&Path::new("/etc").join(name), &root.join("etc").join(name), &mut left)?;
    }
    write(&root.join("etc/passwd"), &users("/etc/passwd", "job:x:1001:1001:job:/home/job:/bin/sh"), 0o644)?;
    write(&root.join("etc/group"), &users("/etc/group", "job:x:1001:"), 0o644)?;
    write(&root.join("etc/nsswitch.conf"), NSSWITCH, 0o644)?;
    write(&root.join("etc/hosts"), HOSTS, 0o644)?;
    let home = root.join("home/job");
    make_dir(&home, 0o755)?;
    chown(&home, Some(JOB_ID), Some(JOB_ID))
}

/// The lines of the host's system users or groups (below 1000, and nobody), and the job's.
fn users(database: &str, job: &str) -> String {
    let text = fs::read_to_string(database).unwrap_or_default();
    let mut lines: Vec<&str> = text
        .lines()
        .filter(|line| {
            let id = line.split(':').nth(2).and_then(|id| id.parse::<u32>().ok());
            id.is_some_and(|id| id < 1000 || id == 65_534)
        })
        .collect();
    lines.push(job);
    lines.join("\n") + "\n"
}

fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn write(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(Permissions::from_mode(mode))
}

/// Copies links, and files and directories that everybody may read; passes over all else.
fn copy(from: &Path, to: &Path, left: &mut usize) -> io::Result<()> {
    let Ok(meta) = fs::symlink_metadata(from) else { return Ok(()) };
    if *left == 0 {
        return Ok(());
    }
    *left -= 1;
    if let Some(parent) = to.parent()
        && !parent.exists()
    {
        make_dir(parent, 0o755)?;
    }
    let readable = meta.mode() & 0o004 != 0;
    if meta.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
        lchown(to, Some(0), Some(0))?;
    } else if meta.is_dir() && readable {
        make_dir(to, meta.mode() & 0o777)?;
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            copy(&from.join(&name), &to.join(&name), left)?;
        }
    } else if meta.is_file() && readable && meta.len() <= MAX_COPY_BYTES {
        fs::copy(from, to)?;
        fs::set_permissions(to, Permissions::from_mode(meta.mode() & 0o755))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skeleton_shows_programs_and_no_secrets() {
        let dir = tempfile::tempdir().expect("dir");
        let layer = HostLayer::make(dir.path()).expect("skeleton");
        let etc = |name: &str| layer.skeleton.join("etc").join(name);
        assert!(layer.trees.contains(&"/usr".to_owned()));
        assert!(fs::read_to_string(etc("passwd")).expect("passwd").contains("job:x:1001:1001:"));
        for secret in ["shadow", "gshadow", "ssh", "sudoers", "machine-id", "hostname", "resolv.conf"] {
            assert!(!etc(secret).exists(), "{secret}");
        }
        assert!(fs::read_dir(layer.skeleton.join("root")).expect("root").next().is_none());
        let again = HostLayer::make(dir.path()).expect("again");
        assert_eq!(again.skeleton, layer.skeleton);
    }

    #[test]
    fn people_of_the_host_are_not_shown() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("passwd");
        fs::write(&path, "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\nbroken\n")
            .expect("write");
        let text = users(path.to_str().expect("path"), "job:x:1001:1001:job:/home/job:/bin/sh");
        assert_eq!(text, "root:x:0:0::/root:/bin/sh\njob:x:1001:1001:job:/home/job:/bin/sh\n");
    }
}
