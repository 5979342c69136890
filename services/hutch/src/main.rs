//! `hutch`: one binary for everything.
//!
//! 1. The command line is read.
//! 2. A command that runs sandboxes forks the launcher, while this process still has one thread.
//! 3. Logging and the runtime start, and the command does its work.

#![allow(dead_code, unused_imports, reason = "the commands that use them follow")]

mod cli;
mod engine;
mod exit;
mod logging;
mod order;
mod run;
mod settings;
mod signals;
mod term;
mod unpack;
mod verdict;

use std::process::ExitCode;

use clap::Parser;
use hutch_sandbox::Launcher;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let on_error = exit::on_error(&cli.command);
    let launcher = match cli.command.runs_sandboxes().then(Launcher::fork).transpose() {
        Ok(launcher) => launcher,
        Err(error) => return term::fail(&anyhow::Error::new(error), on_error),
    };
    logging::start();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.map_err(anyhow::Error::new).and_then(|runtime| {
        let done = runtime.block_on(dispatch(cli, launcher));
        // What still blocks (a read of stdin, say) is not waited for.
        runtime.shutdown_background();
        done
    });
    done.unwrap_or_else(|error| term::fail(&error, on_error))
}

async fn dispatch(cli: Cli, launcher: Option<Launcher>) -> anyhow::Result<ExitCode> {
    let config = cli.config.as_deref();
    match cli.command {
        Command::Run(args) => run::run(*args, config, launcher).await,
        _ => anyhow::bail!("not there yet"),
    }
}
