//! What comes back from a sandbox: fixed-size records on a pipe, written in one piece each.

/// Bytes of one record on the pipe; below PIPE_BUF, so that writes do not mix.
pub const RECORD_BYTES: usize = 24;

/// Where a sandbox was when something failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// The launcher: reading the plan, clone3(2).
    Launch = 1,
    /// init: network namespace and loopback.
    Network,
    /// init: a step of the plan; the index is the step's.
    Step,
    /// init: attaching a volume; the index is the volume's.
    Volume,
    /// init: cloning the program.
    Clone,
    /// init: uid_map and gid_map.
    IdMap,
    /// The program's process: entering its cgroup.
    Cgroup,
    /// The program's process: writing a file; the index is the file's.
    File,
    /// The program's process: no such user or group.
    User,
    /// The program's process: making or entering the working directory.
    Cwd,
    /// The program's process: a resource limit; the index is its place in the plan.
    Rlimit,
    /// The program's process: giving up privileges, seccomp.
    Confine,
    /// The program's process: standard streams and descriptors.
    Stdio,
    /// The program's process: execve(2); nothing there, or nothing that can be run.
    Exec,
}

impl Stage {
    const ALL: [Self; 14] = [
        Self::Launch,
        Self::Network,
        Self::Step,
        Self::Volume,
        Self::Clone,
        Self::IdMap,
        Self::Cgroup,
        Self::File,
        Self::User,
        Self::Cwd,
        Self::Rlimit,
        Self::Confine,
        Self::Stdio,
        Self::Exec,
    ];

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| *stage as u8 == code)
    }
}

/// One thing that happened in a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Set-up failed; the program never ran.
    Failed {
        /// Where.
        stage: Stage,
        /// Why, as of errno(3).
        errno: i32,
        /// Which of several.
        index: u32,
    },
    /// The program is about to run.
    Started {
        /// CLOCK_MONOTONIC, nanoseconds.
        at_ns: u64,
    },
    /// The program ended.
    Ended {
        /// As wait(2) gives it.
        wait_status: i32,
        /// CLOCK_MONOTONIC, nanoseconds.
        at_ns: u64,
    },
}

impl Record {
    /// The record's bytes, in the machine's order.
    #[must_use]
    pub fn to_bytes(self) -> [u8; RECORD_BYTES] {
        let (kind, stage, value, index, at) = match self {
            Self::Failed { stage, errno, index } => (1_u8, stage as u8, errno, index, 0),
            Self::Started { at_ns } => (2, 0, 0, 0, at_ns),
            Self::Ended { wait_status, at_ns } => (3, 0, wait_status, 0, at_ns),
        };
        let mut bytes = [0; RECORD_BYTES];
        bytes[0] = kind;
        bytes[1] = stage;
        bytes[4..8].copy_from_slice(&value.to_ne_bytes());
        bytes[8..12].copy_from_slice(&index.to_ne_bytes());
        bytes[16..24].copy_from_slice(&at.to_ne_bytes());
        bytes
    }

    /// The record of these bytes; none if they are no record.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; RECORD_BYTES]) -> Option<Self> {
        let value = i32::from_ne_bytes(bytes[4..8].try_into().ok()?);
        let index = u32::from_ne_bytes(bytes[8..12].try_into().ok()?);
        let at_ns = u64::from_ne_bytes(bytes[16..24].try_into().ok()?);
        match bytes[0] {
            1 => Some(Self::Failed { stage: Stage::from_code(bytes[1])?, errno: value, index }),
            2 => Some(Self::Started { at_ns }),
            3 => Some(Self::Ended { wait_status: value, at_ns }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_pipe() {
        let mut all: Vec<Record> =
            Stage::ALL.into_iter().map(|stage| Record::Failed { stage, errno: 13, index: 7 }).collect();
        all.push(Record::Started { at_ns: u64::MAX });
        all.push(Record::Ended { wait_status: -1, at_ns: 5 });
        for record in all {
            assert_eq!(Record::from_bytes(&record.to_bytes()), Some(record));
        }
        assert_eq!(Record::from_bytes(&[9; RECORD_BYTES]), None);
    }
}
