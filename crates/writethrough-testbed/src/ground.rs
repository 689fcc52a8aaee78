//! What everything in a testbed needs of it: the folder, the reaper, and the list of processes.

use std::collections::HashMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::process::{Process, Reach};
use crate::reaper::Reaper;

/// The system's folder for temporary files, which must be there.
pub(crate) fn temporary_folder() -> Result<PathBuf> {
    let folder = std::env::temp_dir();
    let usable = folder.canonicalize().and_then(|absolute| {
        let is_folder = absolute.metadata()?.is_dir();
        is_folder
            .then_some(absolute)
            .ok_or_else(|| std::io::ErrorKind::NotADirectory.into())
    });
    usable.map_err(|error| {
        Error::Misuse(format!(
            "the folder for temporary files cannot be used: TMPDIR is {}: {error}; set it to a \
             folder, or unset it for /tmp",
            folder.display()
        ))
    })
}

/// The part of a testbed that its servers and processes hold on to.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(crate) folder: PathBuf,
    pub(crate) reaper: Arc<Reaper>,
    processes: Mutex<Vec<Weak<Process>>>,
    names: Mutex<HashMap<String, u32>>,
}

impl Ground {
    /// Starts the reaper of a folder that is there.
    pub(crate) fn new(folder: PathBuf, keep: bool) -> Result<Self> {
        let reaper = Arc::new(Reaper::start(&folder, keep)?);
        Ok(Self {
            folder,
            reaper,
            processes: Mutex::default(),
            names: Mutex::default(),
        })
    }

    /// Makes a folder for the next server of a kind, and returns it with the server's name.
    pub(crate) fn folder_for(&self, kind: &str) -> Result<(String, PathBuf)> {
        let number = {
            let mut names = self.names.lock();
            let number = names.entry(kind.to_owned()).or_default();
            *number += 1;
            *number
        };
        let name = format!("{kind}-{number}");
        let folder = self.folder.join(&name);
        std::fs::DirBuilder::new()
            .mode(0o711)
            .create(&folder)
            .map_err(Error::io(format!("make the folder {}", folder.display())))?;
        Ok((name, folder))
    }

    /// Makes a program that ends with the testbed.
    pub(crate) fn process(&self, name: String, log: PathBuf, reach: Reach) -> Arc<Process> {
        let process = Arc::new(Process::new(name, log, reach, self.reaper.clone()));
        let mut processes = self.processes.lock();
        processes.retain(|earlier| earlier.strong_count() > 0);
        processes.push(Arc::downgrade(&process));
        process
    }
    /// Kills every process, those whose handles still live too, and lets the reaper do the rest.
    pub(crate) fn close(&self) {
        let processes: Vec<_> = self.processes.lock().drain(..).collect();
        for process in processes.iter().filter_map(Weak::upgrade) {
            process.close();
        }
        self.reaper.finish();
    }
}
