//! `hutch`: one binary for everything.
//!
//! 1. The command line is read.
//! 2. A command that runs sandboxes forks the launcher, while this process still has one thread.
//! 3. Logging and the runtime start, and the command does its work.

mod cli;
mod console;
mod demo;
mod doctor;
mod engine;
mod exit;
mod layer;
mod logging;
mod order;
mod queue;
mod remote;
mod run;
mod services;
mod settings;
mod signals;
mod spec;
mod term;
mod tree;
mod unpack;
mod up;
mod verdict;
mod volume;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use hutch_sandbox::{EngineError, Launcher};

use cli::{Cli, Command, ConfigCommand};
use settings::Flags;

/// The whole of the program: what `main` is.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let on_error = exit::on_error(&cli.command);
    let launcher = cli.command.runs_sandboxes().then(Launcher::fork).transpose();
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

/// Does the command's work. That there is no launcher ends all that need one but the doctor, who says why.
async fn dispatch(cli: Cli, launcher: Result<Option<Launcher>, EngineError>) -> anyhow::Result<ExitCode> {
    let config = cli.config.as_deref();
    match cli.command {
        Command::Run(args) => run::run(*args, config, launcher?).await,
        Command::Up(args) => up::up(args, config, launcher?).await,
        Command::Worker(args) => services::worker(args, config, launcher?).await,
        Command::Gateway(args) => services::gateway(args, config).await,
        Command::Submit(args) => remote::submit(args).await,
        Command::Status(args) => remote::status(args).await,
        Command::Logs(args) => remote::logs(args).await,
        Command::Cancel(args) => remote::cancel(args).await,
        Command::Exec(args) => Ok(remote::exec(&args)),
        Command::Outputs(args) => remote::outputs(args).await,
        Command::Layer(command) => layer::layer(command, config).await,
        Command::Volume(command) => volume::volume(command, config),
        Command::Doctor(args) => doctor::doctor(args, config, launcher).await,
        Command::Spec(command) => spec::spec(command),
        Command::Config(ConfigCommand::Show) => {
            term::text(settings::show(&settings::load(config, &Flags::default())?));
            Ok(ExitCode::SUCCESS)
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "hutch", &mut script);
            term::text(String::from_utf8_lossy(&script));
            Ok(ExitCode::SUCCESS)
        }
    }
}
