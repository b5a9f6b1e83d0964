//! L2 tables and refcount blocks that stand twice while they move.
//!
//! A table that moves is copied to its new place, then its reference is rewritten. From the copy until the new reference
//! is durable, a power cut may leave either place referred to, so what is written to the table goes to both.

use std::collections::HashMap;

use crate::mutation::{Mutation, broken};
use crate::units::HostOffset;

/// For each place of a moving table, the other place.
#[derive(Debug, Default)]
pub(crate) struct Mirrors(HashMap<HostOffset, HostOffset>);

impl Mirrors {
    /// The table at `from` was copied to `to`.
    pub(crate) fn begin(&mut self, from: HostOffset, to: HostOffset) {
        self.0.insert(from, to);
        self.0.insert(to, from);
    }

    /// The move ended: the new reference is durable, or the move was given up.
    pub(crate) fn end(&mut self, from: HostOffset, to: HostOffset) {
        self.0.remove(&from);
        self.0.remove(&to);
    }

    /// Where a table is to be written: its place, and the other if it stands twice.
    pub(crate) fn places(&self, table: HostOffset) -> impl Iterator<Item = HostOffset> + use<> {
        let other = self.0.get(&table).copied().filter(|_| !broken(Mutation::WriteOnePlace));
        std::iter::once(table).chain(other)
    }
}
