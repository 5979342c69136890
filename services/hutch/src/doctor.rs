//! `hutch doctor`: what this host can do, each with its remedy.
//!
//! The last word has a job: if one runs in a sandbox here, jobs can be isolated here.

use std::path::Path;
use std::process::ExitCode;

use hutch_proto::{JobSpec, Status};
use hutch_sandbox::{Engine, Launcher, Order, Unobserved};
use nix::sys::statvfs::statvfs;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::cli::DoctorArgs;
use crate::settings::{self, Flags, Settings};
use crate::{engine, exit, queue, term, verdict};

/// The least room that the data directory should have.
const ROOM: u64 = 1 << 30;

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
    name: &'static str,
    grade: Grade,
    found: String,
    /// What to do about it; empty if nothing.
    remedy: String,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, grade: Grade::Ok, found: found.into(), remedy: String::new() }
    }

    fn bad(name: &'static str, grade: Grade, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, grade, found: found.into(), remedy: remedy.into() }
    }
}

/// Looks at this host and says what it found.
pub(crate) async fn doctor(
    args: DoctorArgs,
    config: Option<&Path>,
    launcher: Option<Launcher>,
) -> anyhow::Result<ExitCode> {
    let data_dir = args.data_dir.as_ref().map(|path| path.display().to_string());
    let flags = Flags::default().set("data_dir", "--data", data_dir);
    let settings = settings::load(config, &flags)?.settings;
    let mut findings = vec![kernel(), user(), data(&settings)];
    findings.push(match launcher {
        Some(launcher) => sandbox(&settings, launcher).await,
        None => Finding::bad("sandbox", Grade::Failure, "the launcher was not started", ""),
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
        text.push_str(&format!("{mark}  {name:<16} {found}\n"));
        if !remedy.is_empty() {
            text.push_str(&format!("{:<24}{remedy}\n", ""));
        }
    }
    text
}

fn kernel() -> Finding {
    match nix::sys::utsname::uname() {
        Ok(name) => Finding::ok(
            "kernel",
            format!(
                "{} {} {}",
                name.sysname().to_string_lossy(),
                name.release().to_string_lossy(),
                name.machine().to_string_lossy()
            ),
        ),
        Err(errno) => Finding::bad("kernel", Grade::Warning, errno.desc(), ""),
    }
}

fn user() -> Finding {
    let id = nix::unistd::geteuid();
    Finding::ok("user", if id.is_root() { "root".to_owned() } else { format!("uid {id}, without root") })
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
        Err(errno) => Finding::bad("data", Grade::Warning, format!("{shown}: {}", errno.desc()), ""),
    }
}

/// Runs a job that does nothing.
async fn sandbox(settings: &Settings, launcher: Launcher) -> Finding {
    let failed = |found: String| Finding::bad("sandbox", Grade::Failure, found, "");
    let started = engine::alone(settings).and_then(|config| Ok(Engine::new(launcher, config)?));
    let engine = match started {
        Ok(engine) => engine,
        Err(error) => return failed(format!("{error:#}")),
    };
    let job = match JobSpec::parse(br#"{"layers": ["host"], "command": ["true"]}"#) {
        Ok(job) => job,
        Err(error) => return failed(error.to_string()),
    };
    let order = Order { job, slot: 0, cancel: CancellationToken::new() };
    let report = engine.run(order, &Unobserved).await;
    if report.status == Status::Succeeded {
        let setup = report.durations.setup_us;
        Finding::ok(
            "sandbox",
            format!("a job ran; it took {}.{:03}ms to prepare", setup / 1000, setup % 1000),
        )
    } else {
        failed(format!("a job that does nothing ended as {}: {}", report.status, report.message))
    }
}
