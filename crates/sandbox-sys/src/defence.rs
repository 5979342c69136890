//! The defences of a sandbox by name, so that the tests can take away one and see that an attack then succeeds.
//!
//! In the product none can be taken away: [`without`] is a constant there, and what it guards is compiled in for good.
//! With the feature `weaken`, which only the tests' own binary has, `HUTCH_WITHOUT=name,name` is read once, before
//! anything is cloned ([`arm`]).

macro_rules! defences {
    ($($(#[$about:meta])+ $variant:ident = $name:literal,)+) => {
        /// One protection of a sandbox.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Defence {
            $($(#[$about])+ $variant,)+
        }

        impl Defence {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name in `HUTCH_WITHOUT`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

defences! {
    /// The program's user namespace: its root is nobody on the host.
    UserNamespace = "user-namespace",
    /// A network namespace with loopback alone.
    NetworkNamespace = "network-namespace",
    /// A network namespace that a slot keeps is proved untouched before each sandbox.
    UntouchedNetwork = "untouched-network",
    /// A PID namespace: no process of the host is seen.
    PidNamespace = "pid-namespace",
    /// An IPC namespace.
    IpcNamespace = "ipc-namespace",
    /// A cgroup namespace.
    CgroupNamespace = "cgroup-namespace",
    /// No descriptor but 0, 1 and 2 survives exec.
    CloseDescriptors = "close-descriptors",
    /// Paths are resolved within the sandbox's root, and links such as those of `/proc/PID/fd` are not followed.
    ScopedPaths = "scoped-paths",
    /// A device tree of our own on `/dev`.
    DeviceTree = "device-tree",
    /// A proc(5) of our own on `/proc`.
    OwnProc = "own-proc",
    /// Masks and read-only paths of proc(5).
    ProcMasks = "proc-masks",
    /// The system call policy.
    Seccomp = "seccomp",
    /// No capabilities at all.
    Capabilities = "capabilities",
    /// no_new_privs.
    NoNewPrivileges = "no-new-privileges",
    /// Mounts on which set-user-ID bits have no effect.
    NoSuid = "nosuid",
    /// Mounts on which device nodes cannot be opened.
    NoDev = "nodev",
    /// The program's environment is what its job says.
    CleanEnvironment = "clean-environment",
    /// Layers and volumes lie below the directories that the config allows.
    AllowedPaths = "allowed-paths",
    /// The data directory is its owner's alone.
    PrivateStore = "private-store",
    /// The program is never process 1, to which the kernel drops signals.
    NeverPidOne = "never-pid-one",
    /// A limit that this host cannot hold is an error.
    HeldLimits = "held-limits",
    /// The limit of a job's group on memory.
    MemoryLimit = "memory-limit",
    /// The limit of a job's group on processes.
    ProcessLimit = "process-limit",
    /// The limit of a job's group on processor time.
    ProcessorLimit = "processor-limit",
    /// How fast a job may use a disk.
    IoRates = "io-rates",
    /// What waits for a disk is let go when its job is killed.
    LiftedRates = "lifted-rates",
    /// A scratch file system of the job's own size.
    SizedScratch = "sized-scratch",
}

/// Whether a defence was taken away. Never, in the product.
#[cfg(not(feature = "weaken"))]
#[must_use]
#[inline]
pub const fn without(_: Defence) -> bool {
    false
}

/// Reads what is to be taken away: nothing, in the product.
#[cfg(not(feature = "weaken"))]
pub(crate) fn arm() {}

#[cfg(feature = "weaken")]
pub use weak::without;

#[cfg(feature = "weaken")]
pub(crate) use weak::arm;

#[cfg(feature = "weaken")]
mod weak {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::Defence;

    static TAKEN_AWAY: AtomicU64 = AtomicU64::new(0);

    /// Whether a defence was taken away.
    #[must_use]
    pub fn without(defence: Defence) -> bool {
        TAKEN_AWAY.load(Ordering::Relaxed) & (1 << defence as u32) != 0
    }

    /// Reads `HUTCH_WITHOUT`. Call it before anything is cloned.
    ///
    /// # Panics
    /// If it has a name that is no defence's.
    pub(crate) fn arm() {
        let names = std::env::var("HUTCH_WITHOUT").unwrap_or_default();
        let bits = names.split(',').filter(|name| !name.is_empty()).fold(0, |bits, name| {
            let known = Defence::ALL.iter().find(|defence| defence.name() == name);
            bits | 1
                << known.copied().unwrap_or_else(|| panic!("HUTCH_WITHOUT: `{name}` is no defence")) as u32
        });
        TAKEN_AWAY.store(bits, Ordering::Relaxed);
    }
}
