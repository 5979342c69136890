//! Tars of layers, entry by entry.

use tar::{Builder, EntryType, Header};

/// A layer that is being made.
pub(crate) struct Layer(Builder<Vec<u8>>);

impl Layer {
    pub(crate) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn add(&mut self, kind: EntryType, path: &str, link: Option<&str>, content: &[u8], mode: u32) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        header.set_mtime(1_500_000_000);
        header.set_uid(0);
        header.set_gid(0);
        if let Some(link) = link {
            header.set_link_name(link).expect("link");
        }
        self.0.append_data(&mut header, path, content).expect("append");
    }

    pub(crate) fn dir(&mut self, path: &str, mode: u32) {
        self.add(EntryType::Directory, path, None, b"", mode);
    }

    pub(crate) fn file(&mut self, path: &str, content: &[u8], mode: u32) {
        self.add(EntryType::Regular, path, None, content, mode);
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.add(EntryType::Symlink, path, Some(target), b"", 0o777);
    }

    pub(crate) fn hard_link(&mut self, path: &str, target: &str) {
        self.add(EntryType::Link, path, Some(target), b"", 0o644);
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("tar")
    }
}
