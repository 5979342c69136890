//! Logs, for those who run a service: on stderr, as much as `HUTCH_LOG` asks for.

use tracing_subscriber::EnvFilter;

/// Starts logging: warnings and errors, or what `HUTCH_LOG` says (`HUTCH_LOG_FORMAT=json` for machines).
pub(crate) fn start() {
    let filter = EnvFilter::builder()
        .with_env_var("HUTCH_LOG")
        .try_from_env()
        .unwrap_or_else(|_| EnvFilter::new("warn,lapin=error"));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let logs =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    let json = std::env::var("HUTCH_LOG_FORMAT").is_ok_and(|format| format == "json");
    // Only a second start could fail, and there is none.
    let _ = if json { logs.json().try_init() } else { logs.with_target(false).try_init() };
}
