//! `hutch volume`: the named volumes that a worker keeps, directories below `volumes/` of its data.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde_json::json;

use crate::cli::VolumeCommand;
use crate::settings::{self, Flags};
use crate::{exit, term, tree, verdict};

/// Lists or removes volumes.
pub(crate) fn volume(command: VolumeCommand, config: Option<&Path>) -> anyhow::Result<ExitCode> {
    match command {
        VolumeCommand::List { data_dir, json } => list(&home(data_dir, config)?, json),
        VolumeCommand::Remove { names, data_dir } => remove(&home(data_dir, config)?, &names),
    }
}

fn home(data_dir: Option<PathBuf>, config: Option<&Path>) -> anyhow::Result<PathBuf> {
    let flags = Flags::default().set("data_dir", "--data", data_dir.map(|path| path.display().to_string()));
    Ok(settings::load(config, &flags)?.settings.data_dir.join("volumes"))
}

fn list(home: &Path, as_json: bool) -> anyhow::Result<ExitCode> {
    let mut volumes = Vec::new();
    let entries = match fs::read_dir(home) {
        Ok(entries) => entries.collect::<Result<Vec<_>, _>>(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    };
    for entry in entries.with_context(|| format!("{} cannot be read", home.display()))? {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && hutch_proto::is_name(&name) {
            volumes.push((name, tree::size(&entry.path())));
        }
    }
    volumes.sort();
    if as_json {
        let rows: Vec<_> =
            volumes.iter().map(|(name, bytes)| json!({"volume": name, "bytes": bytes})).collect();
        term::line(json!(rows));
    } else {
        for (name, bytes) in volumes {
            term::line(format!("{:>10}  {name}", verdict::size(bytes)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(home: &Path, names: &[String]) -> anyhow::Result<ExitCode> {
    let mut missing = 0;
    for name in names {
        if !hutch_proto::is_name(name) {
            bail!("`{name}` is no name of a volume: 1 to 63 letters, digits, `-`, `_` and `.` are expected");
        }
        let volume = home.join(name);
        match fs::symlink_metadata(&volume) {
            Ok(_) => remove_one(home, &volume)
                .with_context(|| format!("volume `{name}` cannot be removed whole"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                term::note(format!("there is no volume `{name}`"));
                missing += 1;
            }
            Err(error) => return Err(error).with_context(|| format!("volume `{name}` cannot be removed")),
        }
    }
    Ok(if missing > 0 { ExitCode::from(exit::FAILURE) } else { ExitCode::SUCCESS })
}

/// It goes out of the way first: a job that starts meanwhile gets a new one.
fn remove_one(home: &Path, volume: &Path) -> anyhow::Result<()> {
    // Kept, since what is left after a failure may be too deep for the directory's own way to go.
    let pit = tempfile::Builder::new().prefix(".removed-").tempdir_in(home)?.keep();
    tree::remove(volume, &pit).with_context(|| {
        // Gone if nothing came into it.
        match fs::remove_dir(&pit) {
            Ok(()) => "it cannot be moved out of the way".to_owned(),
            Err(_) => format!("the rest is in {}", pit.display()),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_removed_with_all_that_is_in_it_and_nothing_else() {
        let data = tempfile::tempdir().expect("data");
        let outside = tempfile::tempdir().expect("outside");
        fs::write(outside.path().join("kept"), "x").expect("write");
        let home = data.path().join("volumes");
        fs::create_dir_all(home.join("cache/deep")).expect("make");
        fs::write(home.join("cache/deep/file"), "12345").expect("write");
        std::os::unix::fs::symlink(outside.path(), home.join("cache/out")).expect("link");
        assert_eq!(tree::size(&home.join("cache")), 5);
        remove(&home, &["cache".to_owned()]).expect("removed");
        assert_eq!(fs::read_dir(&home).expect("home").count(), 0);
        assert!(outside.path().join("kept").exists());
        assert!(remove(&home, &["../volumes".to_owned()]).is_err());
    }
}
