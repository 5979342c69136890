//! `hutch layer`: not there yet, and it says so.

use std::process::ExitCode;

use crate::cli::LayerCommand;
use crate::{exit, term};

/// Says what is not there yet, and what does instead.
pub(crate) fn layer(command: &LayerCommand) -> ExitCode {
    let what = match command {
        LayerCommand::Import { path } => format!("importing {}", path.display()),
        LayerCommand::Pull { image } => format!("pulling {image}"),
        LayerCommand::List => "listing layers".to_owned(),
        LayerCommand::Gc => "removing unused layers".to_owned(),
    };
    term::note(format!("{what} is not there yet: use the layers `host` and `dir:PATH`"));
    ExitCode::from(exit::FAILURE)
}
