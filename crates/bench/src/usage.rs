//! Processor time, of what this process started and of the kernel's own threads: proc_pid_stat(5).

use std::fs;

/// Microseconds of processor time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spent {
    /// Of this process, its launchers, and whatever they have waited for.
    pub(crate) ours_us: u64,
    /// Of the kernel's threads, which take down what is let go: whoever caused it.
    pub(crate) kernel_us: u64,
}

/// Microseconds of a clock tick, as USER_HZ has been for ever.
const TICK_US: u64 = 10_000;
/// The parent of all kernel threads.
const KTHREADD: u64 = 2;

impl Spent {
    /// What was spent until now.
    pub(crate) fn now() -> std::io::Result<Self> {
        let own = u64::from(std::process::id());
        let mut spent = Self::default();
        for entry in fs::read_dir("/proc")?.flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse::<u64>().ok()) else { continue };
            // It may have ended just now.
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            let Some([parent, alone, waited]) = times(&stat) else { continue };
            if pid == own || parent == own {
                spent.ours_us += (alone + waited) * TICK_US;
            } else if parent == KTHREADD {
                spent.kernel_us += alone * TICK_US;
            }
        }
        Ok(spent)
    }

    /// What was spent since an earlier moment.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            ours_us: self.ours_us.saturating_sub(earlier.ours_us),
            kernel_us: self.kernel_us.saturating_sub(earlier.kernel_us),
        }
    }
}

/// Parent, ticks of its own, ticks of the children that it has waited for: fields 4, and 14 to 17.
fn times(stat: &str) -> Option<[u64; 3]> {
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok());
    Some([number(4)?, number(14)? + number(15)?, number(16)? + number(17)?])
}
