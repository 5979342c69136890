//! What a job may use: as asked for ([`LimitsSpec`]), as allowed by a worker ([`LimitPolicy`]),
//! and as it will be enforced ([`Limits`]).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Problem;

/// What happens when a job writes more to stdout or stderr than is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutputOverflow {
    /// The rest is read and dropped; the result says `truncated`.
    #[default]
    Truncate,
    /// The job is killed: `limit_exceeded`, reason `output`.
    Kill,
}

/// Declares the limits once: the wire form with every field optional, the policy's rows, and the
/// resolved form. Kinds: `always` has a value for every job, `maybe` may be unlimited.
macro_rules! limits {
    ($($(#[doc = $doc:literal])+ $name:ident : $kind:ident $(= $default:literal)? ;)+) => {
        /// Limits as a spec gives them; what is left out takes the worker's default.
        #[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct LimitsSpec {
            $($(#[doc = $doc])+ #[serde(skip_serializing_if = "Option::is_none")] pub $name: Option<u64>,)+
            /// Which processors may be used, as in cpuset(7), such as `"0-1"` or `"0,2"`.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub cpuset: Option<String>,
            /// What happens when more output comes than is kept.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub output_overflow: Option<OutputOverflow>,
        }

        /// Limits as they are enforced on one step.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Limits {
            $($(#[doc = $doc])+ pub $name: limits!(@type $kind),)+
            /// Which processors may be used; `None` is all of the worker's.
            pub cpuset: Option<String>,
            /// What happens when more output comes than is kept.
            pub output_overflow: OutputOverflow,
        }

        impl LimitsSpec {
            /// The names of all limits that are numbers.
            pub const NUMBERS: &[&str] = &[$(stringify!($name),)+];

            /// These limits; what is left out is taken from `base`.
            #[must_use]
            pub fn over(&self, base: &Self) -> Self {
                Self {
                    $($name: self.$name.or(base.$name),)+
                    cpuset: self.cpuset.clone().or_else(|| base.cpuset.clone()),
                    output_overflow: self.output_overflow.or(base.output_overflow),
                }
            }

            /// Every numeric limit that is given, with its name.
            pub fn given(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$((stringify!($name), self.$name),)+].into_iter().filter_map(|(name, value)| Some((name, value?)))
            }

            /// The limits of the contract, where it names a default.
            #[must_use]
            pub fn contract_defaults() -> Self {
                Self { $($name: limits!(@default $($default)?),)+ cpuset: None, output_overflow: None }
            }
        }

        impl LimitPolicy {
            /// The limits to enforce for what a spec asks.
            ///
            /// # Errors
            /// One problem for each value above its maximum, with field, value and maximum.
            pub fn resolve(&self, asked: &LimitsSpec, path: &str) -> Result<Limits, Vec<Problem>> {
                let mut problems = Vec::new();
                let wanted = asked.over(&self.defaults).over(&LimitsSpec::contract_defaults());
                $(
                    let $name = self.bounded(stringify!($name), wanted.$name, self.maximums.$name, path, &mut problems);
                )+
                if !problems.is_empty() {
                    return Err(problems);
                }
                Ok(Limits {
                    $($name: limits!(@resolve $kind $name $($default)?),)+
                    cpuset: wanted.cpuset,
                    output_overflow: wanted.output_overflow.unwrap_or_default(),
                })
            }
        }
    };
    (@type always) => { u64 };
    (@type maybe) => { Option<u64> };
    (@default) => { None };
    (@default $default:literal) => { Some($default) };
    (@resolve always $name:ident $default:literal) => { $name.unwrap_or($default) };
    (@resolve maybe $name:ident) => { $name };
}

limits! {
    /// Milliseconds on the clock from the program's start.
    wall_time_ms: always = 60_000;
    /// Milliseconds of user and system time of the whole tree.
    cpu_time_ms: maybe;
    /// Milliseconds without output and without use of a processor.
    idle_time_ms: maybe;
    /// Bytes of memory of the whole tree, page cache and tmpfs included.
    memory_bytes: always = 536_870_912;
    /// Bytes of swap beyond the memory.
    swap_bytes: always = 0;
    /// Processes and threads at one time.
    pids: always = 128;
    /// Thousandths of one processor.
    cpu_millis: always = 1000;
    /// Open files of each process (RLIMIT_NOFILE).
    open_files: always = 1024;
    /// Bytes of the largest file that may be written (RLIMIT_FSIZE).
    file_size_bytes: maybe;
    /// Bytes of stack of each process (RLIMIT_STACK).
    stack_bytes: always = 8_388_608;
    /// Bytes of a core file (RLIMIT_CORE).
    core_bytes: always = 0;
    /// Bytes of files that the job may write.
    disk_bytes: always = 268_435_456;
    /// Files, directories and links that the job may make.
    disk_inodes: always = 100_000;
    /// Bytes a second that may be read from each disk; what is more waits.
    io_read_bytes_per_s: maybe;
    /// Bytes a second that may be written to each disk; what is more waits.
    io_write_bytes_per_s: maybe;
    /// Reads a second from each disk; what is more waits.
    io_read_ops_per_s: maybe;
    /// Writes a second to each disk; what is more waits.
    io_write_ops_per_s: maybe;
    /// Bytes that may be read from disks in all.
    io_read_bytes: maybe;
    /// Bytes that may be written to disks in all.
    io_write_bytes: maybe;
    /// Bytes of stdout that are kept.
    stdout_bytes: always = 1_048_576;
    /// Bytes of stderr that are kept.
    stderr_bytes: always = 1_048_576;
    /// Milliseconds between SIGTERM and SIGKILL when a limit ends the job.
    kill_grace_ms: always = 0;
}

/// A worker's say on limits: what a spec that leaves a limit out gets, and what it may ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LimitPolicy {
    /// Defaults that replace the contract's.
    pub defaults: LimitsSpec,
    /// The highest value that a spec may ask for; none is no maximum.
    pub maximums: LimitsSpec,
}

impl LimitPolicy {
    /// `wanted`, held below `maximum`; an unlimited wish becomes the maximum itself.
    #[expect(clippy::unused_self, reason = "reads as one thing with resolve")]
    fn bounded(
        &self,
        name: &str,
        wanted: Option<u64>,
        maximum: Option<u64>,
        path: &str,
        problems: &mut Vec<Problem>,
    ) -> Option<u64> {
        match (wanted, maximum) {
            (Some(value), Some(most)) if value > most => {
                problems.push(Problem::new(
                    format!("{path}.{name}"),
                    format!("{value} is above this worker's maximum of {most}"),
                ));
                None
            }
            (None, most) => most,
            (value, _) => value,
        }
    }
}
