"""A session that its server has ended is a database that is away, whatever the driver calls it."""

import threading

import pytest
from sqlalchemy.exc import OperationalError

from control_plane.database.engine import open_database, writing


@pytest.mark.postgresql
def test_a_session_that_waited_too_long_in_its_transaction_is_a_lost_one(postgres: str) -> None:
    engine = open_database(postgres, wait_s=0.2)
    session = writing(engine)
    session.connection().exec_driver_sql("SELECT 1")
    threading.Event().wait(1.0)  # the server ends the session after 0.2 s without a statement
    with pytest.raises(OperationalError):
        session.connection().exec_driver_sql("SELECT 1")
    session.close()
    with writing(engine) as session:
        assert session.connection().exec_driver_sql("SELECT 2").scalar_one() == 2
    engine.dispose()
