//! Long work that a Python function watches.

use pyo3::prelude::*;

/// Tells a function how far some work is, and remembers what it raised.
pub(crate) struct Watcher {
    function: Option<Py<PyAny>>,
    raised: Option<PyErr>,
}

impl Watcher {
    pub(crate) fn new(function: Option<Py<PyAny>>) -> Self {
        Watcher { function, raised: None }
    }

    /// Passes what `record` makes on; whether to go on. Ctrl-C ends the work, too.
    pub(crate) fn show(&mut self, record: impl for<'py> FnOnce(Python<'py>) -> PyResult<Bound<'py, PyAny>>) -> bool {
        let go_on = Python::try_attach(|py| {
            py.check_signals()?;
            match &self.function {
                Some(function) => {
                    // Only False cancels: a function that returns nothing is merely informed.
                    let answer = function.bind(py).call1((record(py)?,))?;
                    Ok(answer.is_none() || answer.is_truthy()?)
                }
                None => Ok(true),
            }
        });
        match go_on {
            Some(Ok(go_on)) => go_on,
            Some(Err(e)) => {
                self.raised = Some(e);
                false
            }
            None => false,
        }
    }

    /// # Errors
    /// What the function raised, or Ctrl-C.
    pub(crate) fn finish(self) -> PyResult<()> {
        self.raised.map_or(Ok(()), Err)
    }
}
