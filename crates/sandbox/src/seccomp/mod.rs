//! The system call policy: readable files, each compiled once to a balanced tree of ranges.
//!
//! In order: the families of a policy (`default.toml`, and what `strict.toml` changes) become one action for each system
//! call number ([`policy`]); actions on arguments become instructions ([`rules`]); all of it becomes a filter
//! ([`compile`]). Of each profile there are two: one that refuses, and one whose refusals are told to the engine, for jobs
//! that want to know or be killed. See seccomp(2), seccomp_unotify(2) and
//! Documentation/userspace-api/seccomp_filter.rst.

mod compile;
mod policy;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use hutch_proto::{SeccompProfile, SeccompRefused};
use hutch_sandbox_sys::bpf::Filters;

use policy::{Action, Policy};

pub use policy::PolicyError;
pub(crate) use policy::name;

const DEFAULT: &str = include_str!("default.toml");
const STRICT: &str = include_str!("strict.toml");

const PROFILES: [SeccompProfile; 2] = [SeccompProfile::Default, SeccompProfile::Strict];

/// What each profile does with each call.
fn actions(profile: SeccompProfile) -> Result<BTreeMap<u32, Action>, PolicyError> {
    let mut actions = Policy::parse(DEFAULT)?.actions()?;
    if profile == SeccompProfile::Strict {
        actions.extend(Policy::parse(STRICT)?.actions()?);
    }
    Ok(actions)
}

/// Every filter that a job can have, in the order of [`index`].
///
/// # Errors
/// Never for the policies that are built in (a test holds that); EIO as text if the kernel has no random bytes.
pub fn filters() -> Result<Filters, PolicyError> {
    let start_key = hutch_sandbox_sys::process::random_key()
        .map_err(|errno| PolicyError(format!("no random key: {}", errno.desc())))?;
    let mut programs = Vec::new();
    for profile in PROFILES {
        let quiet = compile::compile(&actions(profile)?, start_key)?;
        let telling = compile::telling(quiet.clone());
        programs.extend([quiet, telling]);
    }
    Ok(Filters { programs, start_key })
}

/// Which of the filters a job gets.
pub(crate) fn index(profile: SeccompProfile, refused: SeccompRefused) -> u8 {
    let profile = match profile {
        SeccompProfile::Default => 0,
        SeccompProfile::Strict => 2,
    };
    profile + u8::from(refused != SeccompRefused::Errno)
}

/// The policies for readers, in Markdown.
///
/// # Errors
/// Never for the policies that are built in; a test holds that.
pub fn describe() -> Result<String, PolicyError> {
    let mut text = String::new();
    for (title, policy) in [("default", DEFAULT), ("strict: what it changes of default", STRICT)] {
        let _ = write!(text, "\n## {title}\n");
        for family in Policy::parse(policy)?.family {
            let reason = family.reason.split_whitespace().collect::<Vec<_>>().join(" ");
            let _ = write!(text, "\n### {}\n\n{reason}\n\n", family.name);
            let mut line = |verb: &str, calls: &str| {
                let calls: Vec<_> = calls.split_whitespace().map(|call| format!("`{call}`")).collect();
                if !calls.is_empty() {
                    let _ = writeln!(text, "- {verb}: {}", calls.join(" "));
                }
            };
            line("allowed", &family.allow);
            line("refused (EPERM)", &family.deny);
            for when in &family.when {
                let rule = toml::Value::try_from(when.rule).map_err(|e| PolicyError(e.to_string()))?;
                line(&format!("if {}", rule.as_str().unwrap_or_default()), &when.calls);
            }
        }
    }
    Ok(text)
}
