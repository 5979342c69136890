//! `hutch`: one binary for everything.
//!
//! 1. The command line is read.
//! 2. While this process still has one thread: a command that runs sandboxes forks the launcher; a service reads its
//!    settings, opens its port, has the engine's process forked, and gives up its privileges.
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
mod privileges;
mod queue;
mod ready;
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

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use hutch_sandbox::{EngineError, Launcher};

use cli::{Cli, Command, ConfigCommand};
use ready::Ready;
use settings::Flags;

/// The whole of the program: what `main` is.
#[must_use]
pub fn main() -> ExitCode {
    hutch_sandbox::heap::give_back_what_is_large();
    let cli = Cli::parse();
    if let Command::Probe { words } = &cli.command {
        return hutch_sandbox::probe(words);
    }
    let on_error = exit::on_error(&cli.command);
    let config = cli.config.clone();
    let begun = Begun::of(&cli.command, config.as_deref());
    logging::start();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime.map_err(anyhow::Error::new).and_then(|runtime| {
        let done = runtime.block_on(dispatch(cli, begun));
        // What still blocks (a read of stdin, say) is not waited for.
        runtime.shutdown_background();
        done
    });
    done.unwrap_or_else(|error| term::fail(&error, on_error))
}

/// What a command began with, while there was one thread.
enum Begun {
    /// Nothing.
    Bare,
    /// The launcher of the doctor.
    Doctor(Result<Launcher, EngineError>),
    /// What `run` needs.
    Run(anyhow::Result<Box<run::Bench>>),
    /// The store that `layer` works on.
    Layer(anyhow::Result<Box<layer::Shelf>>),
    /// A service without its privileges.
    Service(anyhow::Result<Box<Ready>>),
}

impl Begun {
    fn of(command: &Command, config: Option<&Path>) -> Self {
        let service = match command {
            Command::Doctor(_) => return Self::Doctor(Launcher::fork()),
            Command::Run(args) => return Self::Run(run::ready(args, config).map(Box::new)),
            Command::Layer(command) => return Self::Layer(layer::ready(command, config).map(Box::new)),
            Command::Up(args) => up::ready(args, config),
            Command::Worker(args) => services::worker_ready(args, config),
            Command::Gateway(args) => services::gateway_ready(args, config),
            _ => return Self::Bare,
        };
        Self::Service(service.map(Box::new))
    }
}

/// Does the command's work. That there is no launcher ends all that need one but the doctor, who says why.
async fn dispatch(cli: Cli, begun: Begun) -> anyhow::Result<ExitCode> {
    let config = cli.config.as_deref();
    match (cli.command, begun) {
        (Command::Run(args), Begun::Run(bench)) => run::run(*args, bench.map(|bench| *bench)).await,
        (Command::Up(args), Begun::Service(ready)) => up::up(args, *ready?).await,
        (Command::Worker(_), Begun::Service(ready)) => services::worker(*ready?).await,
        (Command::Gateway(_), Begun::Service(ready)) => services::gateway(*ready?).await,
        (Command::Layer(command), Begun::Layer(shelf)) => {
            layer::layer(command, shelf.map(|shelf| *shelf)).await
        }
        (Command::Doctor(args), Begun::Doctor(launcher)) => doctor::doctor(args, config, launcher).await,
        (command, _) => perform(command, config).await,
    }
}

/// The work of a command that begins with nothing.
async fn perform(command: Command, config: Option<&Path>) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(_)
        | Command::Up(_)
        | Command::Worker(_)
        | Command::Gateway(_)
        | Command::Layer(_)
        | Command::Probe { .. }
        | Command::Doctor(_) => anyhow::bail!("this command was not made ready"),
        Command::Submit(args) => remote::submit(args).await,
        Command::Status(args) => remote::status(args).await,
        Command::Logs(args) => remote::logs(args).await,
        Command::Cancel(args) => remote::cancel(args).await,
        Command::Exec(args) => remote::exec(args).await,
        Command::Outputs(args) => remote::outputs(args).await,
        Command::Volume(command) => volume::volume(command, config),
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
