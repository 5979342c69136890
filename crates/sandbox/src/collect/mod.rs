//! What a job wrote, read from its upper directories after its last process is dead.
//!
//! In order: the upper directories are walked by descriptors ([`walk`]), never following a link and
//! never opening what is not a regular file; what the job's globs match is listed, hashed, and put into
//! an archive ([`archive`]), up to the caps of the config; all of it becomes a layer ([`layer`]) if the job asks for one.

mod archive;
mod layer;
mod walk;

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use hutch_proto::{Archive, Digest, Mode, OutputFile, OutputKind, Outputs};

use crate::config::EngineConfig;
use crate::plan::JobPlan;
use crate::prepare::Prepared;

use archive::ArchiveWriter;
pub use layer::CommittedLayer;
use walk::{Entry, Kind, Walk};

/// What was kept of what a job wrote.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) outputs: Outputs,
    /// The archive's bytes, in a file without a name.
    pub(crate) archive: Option<File>,
    /// The layer that it became.
    pub(crate) layer: Option<CommittedLayer>,
}

/// How many bytes the list of outputs may have in a result, about.
const MAX_LISTED_BYTES: usize = 1_800_000;
/// What an entry of the list has besides its path.
const ENTRY_BYTES: usize = 160;
/// How long reading may take, whatever a job left.
const MOST_TIME: Duration = Duration::from_secs(60);

/// Places that are the sandbox's own, not the job's.
const OWN: [&str; 2] = ["/dev", "/proc"];

/// Reads what the job's globs match, and makes a layer of all that it wrote if it is to be one.
pub(crate) fn collect(plan: &JobPlan, prepared: &Prepared, config: &EngineConfig) -> io::Result<Collected> {
    let mut collected =
        if plan.globs.is_empty() { Collected::default() } else { listed(plan, prepared, config)? };
    if plan.commit {
        match layer::commit(plan, prepared, config)? {
            Some(layer) => {
                collected.outputs.layer = Some(layer.diff_id.clone());
                collected.layer = Some(layer);
            }
            None => collected.outputs.truncated = true,
        }
    }
    Ok(collected)
}

/// What the globs match, and the archive of it.
fn listed(plan: &JobPlan, prepared: &Prepared, config: &EngineConfig) -> io::Result<Collected> {
    let globs = compile(&plan.globs)?;
    let mut archive = ArchiveWriter::new(&config.data_dir, config.max_archive_bytes)?;
    let mut outputs = Outputs::default();
    let (begun, mut listed) = (Instant::now(), 0);
    'uppers: for upper in &prepared.scratch.uppers {
        let mut walk = Walk::new(&upper.dir, &upper.prefix)?;
        while let Some(entry) = walk.next()? {
            let path = entry.shown_path();
            if begun.elapsed() > MOST_TIME {
                outputs.truncated = true;
                break 'uppers;
            }
            if entry.only_holds || OWN.contains(&path.as_str()) || !globs.is_match(&path) {
                continue;
            }
            listed += path.len() + ENTRY_BYTES + entry.kind.target_bytes();
            if outputs.files.len() == config.max_output_files || listed > MAX_LISTED_BYTES {
                outputs.truncated = true;
                break 'uppers;
            }
            let file = keep(&entry, path, &mut archive, &mut outputs.truncated)?;
            outputs.files.push(file);
        }
        outputs.truncated |= walk.was_cut();
    }
    outputs.files.sort_by(|a, b| a.path.cmp(&b.path));
    let archive = archive.finish()?.map(|(file, hash, bytes)| {
        outputs.archive = Some(Archive { blob: Digest::from_sha256(hash), bytes });
        file
    });
    Ok(Collected { outputs, archive, layer: None })
}

/// Globs in which `*` stays within a directory and `**` does not.
fn compile(globs: &[String]) -> io::Result<GlobSet> {
    let mut set = GlobSetBuilder::new();
    for glob in globs {
        let glob = GlobBuilder::new(glob).literal_separator(true).build();
        set.add(glob.map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?);
    }
    set.build().map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

/// Says what an entry is, and puts it into the archive.
fn keep(
    entry: &Entry,
    path: String,
    archive: &mut ArchiveWriter,
    truncated: &mut bool,
) -> io::Result<OutputFile> {
    let mut file = OutputFile {
        path,
        kind: OutputKind::File,
        mode: Some(Mode::from_bits(entry.stat.st_mode)),
        bytes: 0,
        sha256: None,
        target: None,
    };
    match &entry.kind {
        Kind::File => {
            file.bytes = u64::try_from(entry.stat.st_size).unwrap_or(0);
            match archive.add_file(entry)? {
                Some(hash) => file.sha256 = Some(hex::encode(hash)),
                None => *truncated = true,
            }
        }
        Kind::Dir => {
            file.kind = OutputKind::Dir;
            *truncated |= !archive.add_dir(entry)?;
        }
        Kind::Symlink(target) => {
            file.kind = OutputKind::Symlink;
            file.target = Some(String::from_utf8_lossy(target).into_owned());
            *truncated |= !archive.add_link(entry, target)?;
        }
        Kind::Deleted => {
            file.kind = OutputKind::Deleted;
            file.mode = None;
        }
        Kind::Special => file.kind = OutputKind::Special,
    }
    Ok(file)
}
