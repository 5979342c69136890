//! Who a service is once it has begun: started by root, it goes on as an ordinary user.
//!
//! 1. [`service_user`] finds out who that is: `hutch`, if this host has such a user, else a number.
//! 2. [`Homes::make`], as root, makes the directories that are that user's: `service` in the data directory, and a store in
//!    a directory. What an older version kept there as root is handed over, once.
//! 3. [`give_up`], after files and ports are open and the engine's process is forked.
//!
//! Nothing here is done when another user than root starts a service: it is one already.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use hutch_sandbox::separate::become_user;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{User, geteuid};

/// The user that services are, by name.
const NAME: &str = "hutch";
/// Who they are where there is no such user: a number that distributions give to nobody.
const NUMBER: u32 = 65_530;
/// What a service keeps in its directory, and an older version kept in the data directory itself.
const QUEUE_FILES: [&str; 2] = ["queue.db", "index.db"];
/// What a store has in its directory.
const STORE_NAMES: [&str; 9] =
    ["blobs", "tmp", "images", "layers", "jobs", "results", "cancelled", "attempts", "bands"];
/// MS_NOSYMFOLLOW of mount(2).
const NO_LINKS: nix::libc::c_ulong = 256;
/// Where directories are shown that their user could not come to: in this process's own mount namespace.
const SHOWN: &str = "/run/hutch";

/// An ordinary user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ordinary {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Whether this host knows it by name.
    pub(crate) named: bool,
}

/// The user that services go on as; none if they stay who they are, as they do unless root starts them.
pub(crate) fn service_user() -> Option<Ordinary> {
    if !geteuid().is_root() {
        return None;
    }
    let known = User::from_name(NAME).ok().flatten().filter(|user| !user.uid.is_root());
    let user = match known {
        Some(user) => Ordinary { uid: user.uid.as_raw(), gid: user.gid.as_raw(), named: true },
        None => Ordinary { uid: NUMBER, gid: NUMBER, named: false },
    };
    // Root of a user namespace that has no other ids cannot become anybody.
    (is_mapped("uid_map", user.uid) && is_mapped("gid_map", user.gid)).then_some(user)
}

/// Whether an id exists here: user_namespaces(7).
fn is_mapped(map: &str, id: u32) -> bool {
    let Ok(text) = fs::read_to_string(format!("/proc/self/{map}")) else { return true };
    text.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        matches!((numbers.next(), numbers.nth(1)), (Some(Ok(first)), Some(Ok(count))) if id >= first && id - first < count)
    })
}

/// The directories of a service, as it will see them.
#[derive(Debug)]
pub(crate) struct Homes {
    /// Queue, index and blobs.
    pub(crate) service: PathBuf,
    /// A store in a directory of its own.
    pub(crate) store: Option<PathBuf>,
    /// Whose they are, where that is somebody else.
    belongs_to: Option<Ordinary>,
}

impl Homes {
    /// Those of a service that will be this user, if it is to be another.
    pub(crate) fn of_service(
        data: &Path,
        store: Option<&Path>,
        user: Option<Ordinary>,
    ) -> anyhow::Result<Self> {
        Self::make(data, store, user, Shown { when: When::ItIsClosed, own_mounts: false })
    }

    /// Those of a command that is started by root and stays root: it shares them with services, and follows no link that
    /// one of them might have put there.
    pub(crate) fn of_command(data: &Path, store: Option<&Path>) -> anyhow::Result<Self> {
        let user = service_user();
        let homes = Self::make(data, store, user, Shown { when: When::Always, own_mounts: false })?;
        Ok(Self { belongs_to: user, ..homes })
    }

    /// Gives what this command wrote to the user that services are.
    pub(crate) fn give_back(&self) {
        let Some(user) = self.belongs_to else { return };
        for home in [Some(&self.service), self.store.as_ref()].into_iter().flatten() {
            if let Err(error) = give_store(home, user) {
                tracing::warn!(%error, "{}: a service may not be able to use all of it", home.display());
            }
        }
    }

    fn make(
        data: &Path,
        store: Option<&Path>,
        user: Option<Ordinary>,
        mut shown: Shown,
    ) -> anyhow::Result<Self> {
        let service = data.join("service");
        make(data)?;
        take_along(data, &service)?;
        make(&service)?;
        if let Some(store) = store {
            make(store)?;
        }
        let Some(user) = user else {
            return Ok(Self { service, store: store.map(Path::to_owned), belongs_to: None });
        };
        // Its group may pass through, and see nothing else.
        lchown(data, None, Some(user.gid)).with_context(|| cannot_hand_over(data))?;
        fs::set_permissions(data, fs::Permissions::from_mode(0o710))
            .with_context(|| cannot_hand_over(data))?;
        hand_over(&service, user).with_context(|| cannot_hand_over(&service))?;
        if let Some(store) = store {
            check_store(store, user)?;
            hand_over(store, user).with_context(|| cannot_hand_over(store))?;
        }
        Ok(Self {
            service: shown.to(user, service, "service")?,
            store: store.map(|store| shown.to(user, store.to_owned(), "store")).transpose()?,
            belongs_to: None,
        })
    }
}

fn cannot_hand_over(path: &Path) -> String {
    format!("{} cannot be given to the user that services are", path.display())
}

fn make(directory: &Path) -> anyhow::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory).with_context(|| {
        format!("the directory {} cannot be made: choose another with --data DIR", directory.display())
    })
}

/// Moves what an older version kept in the data directory itself.
fn take_along(data: &Path, service: &Path) -> anyhow::Result<()> {
    if service.exists() || !QUEUE_FILES.iter().any(|name| data.join(name).exists()) {
        return Ok(());
    }
    make(service)?;
    let entries = fs::read_dir(data).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    for entry in entries.with_context(|| format!("{} cannot be read", data.display()))? {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if STORE_NAMES.contains(&&*name) || QUEUE_FILES.iter().any(|file| name.starts_with(file)) {
            fs::rename(entry.path(), service.join(&*name)).with_context(|| {
                format!("{} cannot be moved to {}", entry.path().display(), service.display())
            })?;
        }
    }
    Ok(())
}

/// A directory that has other things than a store's in it is not ours to give away.
fn check_store(store: &Path, user: Ordinary) -> anyhow::Result<()> {
    if fs::symlink_metadata(store)?.uid() != 0 {
        return Ok(());
    }
    for entry in fs::read_dir(store).with_context(|| format!("{} cannot be read", store.display()))? {
        let name = entry?.file_name();
        if !STORE_NAMES.contains(&&*name.to_string_lossy()) {
            bail!(
                "store.url: {} has other things in it, such as {}: name a directory of the store's own, or give it to the \
                 user that services are by `chown -R {}:{} DIR`",
                store.display(),
                Path::new(&name).display(),
                user.uid,
                user.gid
            );
        }
    }
    Ok(())
}

/// Gives a directory of root's and all in it to a user. One that is its user's already is left alone: whoever has it could
/// have put a link there, and root would give away what that leads to.
fn hand_over(directory: &Path, user: Ordinary) -> io::Result<()> {
    if fs::symlink_metadata(directory)?.uid() != 0 {
        return Ok(());
    }
    give_below(directory, user)?;
    lchown(directory, Some(user.uid), Some(user.gid))
}

/// Nobody but root can have come here so far: the paths are as they are read.
fn give_below(directory: &Path, user: Ordinary) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            give_below(&entry.path(), user)?;
        }
        lchown(entry.path(), Some(user.uid), Some(user.gid))?;
    }
    Ok(())
}

/// Gives what root has put into a store to its user; below a directory on which no link is followed. What has another
/// name elsewhere stays root's: that name may be anything's.
fn give_store(store: &Path, user: Ordinary) -> io::Result<()> {
    for name in STORE_NAMES {
        let place = store.join(name);
        if let Ok(meta) = fs::symlink_metadata(&place)
            && meta.is_dir()
        {
            give_roots(&place, user)?;
            give_one(&place, &meta, user)?;
        }
    }
    Ok(())
}

fn give_roots(directory: &Path, user: Ordinary) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            // A service may have removed it just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if meta.is_dir() {
            give_roots(&path, user)?;
        }
        give_one(&path, &meta, user)?;
    }
    Ok(())
}

fn give_one(path: &Path, meta: &fs::Metadata, user: Ordinary) -> io::Result<()> {
    let alone = meta.is_dir() || (meta.is_file() && meta.nlink() == 1);
    if meta.uid() == 0 && alone { lchown(path, Some(user.uid), Some(user.gid)) } else { Ok(()) }
}

/// When a directory is shown elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// Its user cannot come to it.
    ItIsClosed,
    /// Always, and no link in it is followed: mount(2), MS_NOSYMFOLLOW.
    Always,
}

/// Shows directories elsewhere, since somebody who may not pass through those above them cannot use them.
#[derive(Debug)]
struct Shown {
    when: When,
    own_mounts: bool,
}

impl Shown {
    /// Where this user finds a directory.
    fn to(&mut self, user: Ordinary, directory: PathBuf, name: &str) -> anyhow::Result<PathBuf> {
        let directory =
            directory.canonicalize().with_context(|| format!("{} cannot be found", directory.display()))?;
        let closed = directory.ancestors().skip(1).find(|above| !may_pass(above, user));
        if closed.is_none() && self.when == When::ItIsClosed {
            return Ok(directory);
        }
        let place = Path::new(SHOWN).join(name);
        self.bind(&directory, &place).with_context(|| {
            format!(
                "{} cannot be shown to uid {}, as which services run, in another place{}",
                directory.display(),
                user.uid,
                closed
                    .map(|above| format!("; it may not pass through {}", above.display()))
                    .unwrap_or_default()
            )
        })?;
        Ok(place)
    }

    fn bind(&mut self, from: &Path, to: &Path) -> anyhow::Result<()> {
        if !self.own_mounts {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
            self.own_mounts = true;
        }
        DirBuilder::new().recursive(true).mode(0o755).create(to)?;
        mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        if self.when == When::Always {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::from_bits_retain(NO_LINKS);
            mount(None::<&str>, to, None::<&str>, flags, None::<&str>)?;
        }
        Ok(())
    }
}

/// Whether a user may pass through a directory.
fn may_pass(directory: &Path, user: Ordinary) -> bool {
    fs::metadata(directory).is_ok_and(|meta| {
        let shift = match (meta.uid() == user.uid, meta.gid() == user.gid) {
            (true, _) => 6,
            (_, true) => 3,
            _ => 0,
        };
        meta.mode() >> shift & 1 == 1
    })
}

/// Goes on as this user, for good.
pub(crate) fn give_up(user: Ordinary) -> anyhow::Result<()> {
    become_user(user.uid, user.gid).with_context(|| {
        format!(
            "this process cannot go on as uid {}: it needs CAP_SETUID and CAP_SETGID at its start, which a container must \
             be given too",
            user.uid
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_older_version_kept_is_taken_along_once() {
        let data = tempfile::tempdir().expect("data");
        for name in ["queue.db", "queue.db-wal", "index.db"] {
            fs::write(data.path().join(name), name).expect("write");
        }
        fs::create_dir_all(data.path().join("blobs/sha256")).expect("blobs");
        fs::create_dir_all(data.path().join("volumes/v")).expect("volumes");
        let homes = Homes::of_service(data.path(), None, None).expect("homes");
        assert_eq!(homes.service, data.path().join("service"));
        for name in ["queue.db", "queue.db-wal", "index.db", "blobs/sha256"] {
            assert!(homes.service.join(name).exists() && !data.path().join(name).exists(), "{name}");
        }
        assert!(data.path().join("volumes/v").exists());
        fs::create_dir_all(data.path().join("blobs")).expect("blobs of `hutch run`");
        Homes::of_service(data.path(), None, None).expect("again");
        assert!(data.path().join("blobs").exists());
    }

    #[test]
    fn a_directory_that_is_nobody_s_store_is_not_given_away() {
        let user = Ordinary { uid: NUMBER, gid: NUMBER, named: false };
        if !geteuid().is_root() {
            return;
        }
        let store = tempfile::tempdir().expect("store");
        fs::create_dir(store.path().join("blobs")).expect("blobs");
        check_store(store.path(), user).expect("a store");
        fs::write(store.path().join("letter"), "").expect("write");
        let error = check_store(store.path(), user).expect_err("not only a store").to_string();
        assert!(error.contains("letter") && error.contains("chown"), "{error}");
    }

    #[test]
    fn ids_are_looked_up_in_the_map() {
        assert!(is_mapped("uid_map", geteuid().as_raw()));
    }
}
