//! `hutch doctor`: what this host can do, each with its remedy.
//!
//! The last word have attacks: if a sandbox that is made here holds them, jobs are isolated here.

use std::borrow::Cow;
use std::path::Path;
use std::process::ExitCode;

use hutch_sandbox::{Engine, EngineError, Launcher, Proof, Trial};
use nix::sys::statvfs::statvfs;
use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::settings::{self, Flags, Settings};
use crate::{engine, exit, privileges, queue, term, verdict};

/// The least room that the data directory should have.
const ROOM: u64 = 1 << 30;

/// The oldest kernel on which all of the limits hold.
const KERNEL: (u32, u32) = (6, 1);
const KERNEL_REMEDY: &str = "use Linux 6.1 or newer";
const SANDBOX_REMEDY: &str =
    "run it as root, or in a container with SYS_ADMIN, NET_ADMIN, SYS_PTRACE and writable cgroups";

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Grade {
    /// As it should be.
    Ok,
    /// Something is less than it could be.
    Warning,
    /// No job could be isolated.
    Failure,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    name: Cow<'static, str>,
    grade: Grade,
    found: String,
    /// What to do about it; empty only if it is as it should be.
    remedy: String,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name: name.into(), grade: Grade::Ok, found: found.into(), remedy: String::new() }
    }

    fn bad(name: &'static str, grade: Grade, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), grade, found: found.into(), remedy: remedy.into() }
    }
}

/// Looks at this host and says what it found.
pub(crate) async fn doctor(
    args: DoctorArgs,
    config: Option<&Path>,
    launcher: Result<Launcher, EngineError>,
) -> anyhow::Result<ExitCode> {
    let data_dir = args.data_dir.as_ref().map(|path| path.display().to_string());
    let flags = Flags::default().set("data_dir", "--data", data_dir);
    let settings = settings::load(config, &flags)?.settings;
    let mut findings = vec![kernel(), user(), core_pattern(), data(&settings)];
    findings.extend(match launcher {
        Ok(launcher) => attacks(&settings, launcher).await,
        Err(error) => vec![Finding::bad("sandbox", Grade::Failure, error.to_string(), SANDBOX_REMEDY)],
    });
    let failed = findings.iter().any(|finding| finding.grade == Grade::Failure);
    if args.json {
        term::line(serde_json::to_string_pretty(&serde_json::json!({"ok": !failed, "findings": findings}))?);
    } else {
        term::text(show(&findings));
    }
    Ok(if failed { ExitCode::from(exit::FAILURE) } else { ExitCode::SUCCESS })
}

fn show(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { name, grade, found, remedy } in findings {
        let mark = match grade {
            Grade::Ok => "ok  ",
            Grade::Warning => "warn",
            Grade::Failure => "FAIL",
        };
        text.push_str(&format!("{mark}  {name:<17} {found}\n"));
        if !remedy.is_empty() {
            text.push_str(&format!("{:<24}{remedy}\n", ""));
        }
    }
    text
}

fn kernel() -> Finding {
    match nix::sys::utsname::uname() {
        Ok(name) => kernel_of(
            &name.sysname().to_string_lossy(),
            &name.release().to_string_lossy(),
            &name.machine().to_string_lossy(),
        ),
        Err(errno) => Finding::bad("kernel", Grade::Warning, errno.desc(), KERNEL_REMEDY),
    }
}

fn kernel_of(system: &str, release: &str, machine: &str) -> Finding {
    let found = format!("{system} {release} {machine}");
    // Such as 6.1.0-18-amd64, or 6.12-rc3.
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= KERNEL => Finding::ok("kernel", found),
        _ => Finding::bad("kernel", Grade::Warning, found, KERNEL_REMEDY),
    }
}

/// core(5): a pattern that begins with `|` names a program, which the kernel runs outside of every sandbox.
fn core_pattern() -> Finding {
    match std::fs::read_to_string("/proc/sys/kernel/core_pattern") {
        Ok(pattern) => core_pattern_of(pattern.trim_end()),
        Err(error) => Finding::bad(
            "core_pattern",
            Grade::Warning,
            format!("/proc/sys/kernel/core_pattern cannot be read: {error}"),
            "mount proc at /proc",
        ),
    }
}

fn core_pattern_of(pattern: &str) -> Finding {
    let shown = term::safe_line(pattern);
    if pattern.starts_with('|') {
        let found =
            format!("`{shown}`: the core of a job that crashes would be handed to a program of this host");
        Finding::bad("core_pattern", Grade::Warning, found, "sysctl kernel.core_pattern=core")
    } else {
        Finding::ok("core_pattern", shown)
    }
}

fn user() -> Finding {
    let id = nix::unistd::geteuid();
    match privileges::service_user() {
        Some(user) => {
            let name = if user.named { "the user hutch, " } else { "" };
            Finding::ok("user", format!("root; services go on as {name}uid {}, without privileges", user.uid))
        }
        None if id.is_root() => Finding::bad(
            "user",
            Grade::Warning,
            "root; services cannot go on as another user, since there is none in this user namespace",
            "map a range of ids into it (newuidmap, or a container with a range)",
        ),
        None => Finding::ok("user", format!("uid {id}, without root")),
    }
}

fn data(settings: &Settings) -> Finding {
    let directory = match queue::data_dir(settings) {
        Ok(directory) => directory,
        Err(error) => {
            return Finding::bad(
                "data",
                Grade::Failure,
                format!("{error:#}"),
                "choose another with --data DIR",
            );
        }
    };
    let shown = directory.display();
    match statvfs(&directory) {
        Ok(room) => {
            let bytes = room.blocks_available().saturating_mul(room.fragment_size());
            let found = format!("{shown} has {} of room", verdict::size(bytes));
            if bytes < ROOM {
                let remedy = "free some, or choose another directory with --data DIR";
                Finding::bad("data", Grade::Warning, found, remedy)
            } else {
                Finding::ok("data", found)
            }
        }
        Err(errno) => Finding::bad(
            "data",
            Grade::Warning,
            format!("{shown}: {}", errno.desc()),
            "choose another directory with --data DIR",
        ),
    }
}

/// Attacks sandboxes of an engine's own, a finding for each attack.
async fn attacks(settings: &Settings, launcher: Launcher) -> Vec<Finding> {
    let started = queue::trees(settings)
        .and_then(|trees| engine::alone(settings, trees))
        .and_then(|config| Ok(Engine::new(launcher, config)?));
    let (proof, egress) = match started {
        Ok(engine) => (engine.prove().await, Some(egress(&engine))),
        Err(error) => (Proof::failed(format!("{error:#}")), None),
    };
    let finding = |Trial { name, held, seen, remedy }: Trial| Finding {
        name: name.into(),
        grade: if held { Grade::Ok } else { Grade::Failure },
        found: term::safe_line(&seen),
        remedy,
    };
    proof.trials.into_iter().map(finding).chain(egress).collect()
}

/// Whether jobs can have a way out; without, they are refused, and nothing else is amiss.
fn egress(engine: &Engine) -> Finding {
    match engine.egress() {
        Ok(()) => Finding::ok("egress", "jobs may have a way out to the internet"),
        Err(why) => Finding::bad(
            "egress",
            Grade::Warning,
            format!("jobs with network `egress` are rejected: {why}"),
            "install passt and nftables, or set worker.egress.enabled = false",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_is_warned_of() {
        for (release, grade) in [
            ("6.1.0-18-amd64", Grade::Ok),
            ("6.12-rc3", Grade::Ok),
            ("10.0.0", Grade::Ok),
            ("5.15.167.4-microsoft-standard-WSL2", Grade::Warning),
            ("6.0.12", Grade::Warning),
            ("unknown", Grade::Warning),
        ] {
            let finding = kernel_of("Linux", release, "x86_64");
            assert_eq!(finding.grade, grade, "{finding:?}");
            assert_eq!(finding.remedy.is_empty(), grade == Grade::Ok, "{finding:?}");
            assert!(finding.found.contains(release));
        }
    }

    #[test]
    fn a_core_that_would_leave_the_sandbox_is_warned_of() {
        let piped = core_pattern_of("|/usr/lib/systemd/systemd-coredump %P");
        assert_eq!((piped.grade, piped.remedy.as_str()), (Grade::Warning, "sysctl kernel.core_pattern=core"));
        assert_eq!(core_pattern_of("core.%p").grade, Grade::Ok);
    }
}
