"""Django's commands, for an example: ``python manage.py runserver --settings=plain.settings``."""

import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
