//! What internal snapshots may hold: the model's side of them.

use std::collections::BTreeMap;

use super::content::{Content, SECTOR, recognise};
use super::model::{Choice, Mismatch};

/// A snapshot.
#[derive(Clone, Debug)]
struct Taken {
    /// What each sector of its disk may hold.
    sectors: Vec<Choice>,
    /// Whether it is being made: requests of this time may be in it.
    coming: bool,
    /// Whether it must be in every image that a power cut leaves.
    certain: bool,
}

/// All snapshots that an image may have, by name.
#[derive(Clone, Debug, Default)]
pub struct TakenAll(BTreeMap<String, Taken>);

impl TakenAll {
    /// A snapshot that holds this is there.
    pub fn insert(&mut self, name: &str, disk: &[u8]) {
        let sectors = disk.chunks_exact(SECTOR).map(|s| vec![recognise(s)]).collect();
        self.0.insert(name.to_owned(), Taken { sectors, coming: false, certain: true });
    }

    /// One is being made, of a disk that may hold this.
    pub fn comes(&mut self, name: &str, sectors: Vec<Choice>) {
        self.0.insert(name.to_owned(), Taken { sectors, coming: true, certain: false });
    }

    /// A request begins that gives a sector one of these contents.
    pub fn request(&mut self, sector: u64, allowed: &Choice) {
        for taken in self.0.values_mut().filter(|t| t.coming) {
            if let Some(seen) = taken.sectors.get_mut(sector as usize) {
                seen.extend(allowed);
            }
        }
    }

    /// One may go.
    pub fn goes(&mut self, name: &str) {
        if let Some(taken) = self.0.get_mut(name) {
            taken.certain = false;
        }
    }

    /// What came or went is there or not, for certain or (`None`) nobody knows.
    pub fn settled(&mut self, name: &str, there: Option<bool>) {
        if there == Some(false) {
            self.0.remove(name);
        } else if let Some(taken) = self.0.get_mut(name) {
            taken.coming = false;
            taken.certain = there.is_some();
        }
    }

    /// The names of those that are there for certain.
    pub fn names(&self) -> Vec<String> {
        self.0.iter().filter(|(_, t)| t.certain).map(|(name, _)| name.clone()).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What a snapshot's disk may hold.
    pub fn sectors(&self, name: &str) -> Option<&[Choice]> {
        self.0.get(name).map(|t| &t.sectors[..])
    }

    /// Compares the disk of a snapshot with what it may hold.
    ///
    /// # Errors
    /// What is wrong.
    pub fn survived(&self, name: &str, bytes: &[u8]) -> Result<(), String> {
        let Some(taken) = self.0.get(name) else { return Err(format!("there is a snapshot {name:?}")) };
        if bytes.len() != taken.sectors.len() * SECTOR {
            return Err(format!("the disk of snapshot {name:?} has {} bytes", bytes.len()));
        }
        for (sector, (found, allowed)) in bytes.chunks_exact(SECTOR).map(recognise).zip(&taken.sectors).enumerate() {
            if !allowed.contains(&found) {
                let mismatch = Mismatch { sector: sector as u64, found };
                let show = allowed.iter().map(Content::to_string).collect::<Vec<_>>().join(" | ");
                return Err(format!("in snapshot {name:?} {mismatch}; allowed is {show}"));
            }
        }
        Ok(())
    }

    /// Whether a snapshot that must be there is not among these.
    ///
    /// # Errors
    /// It is not.
    pub fn all_there(&self, names: &[String]) -> Result<(), String> {
        match self.names().into_iter().find(|name| !names.contains(name)) {
            Some(name) => Err(format!("the snapshot {name:?} is gone; there are {names:?}")),
            None => Ok(()),
        }
    }
}
