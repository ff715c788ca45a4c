# The password is in a file, and the address goes into a variable: everyone may read a process's arguments.
set -eu
MLFLOW_BACKEND_STORE_URI="postgresql+psycopg2://mlflow:$(cat /run/secrets/postgres_password)@postgres:5432/mlflow"
export MLFLOW_BACKEND_STORE_URI
exec mlflow server --host 0.0.0.0 --port 5000 --artifacts-destination /artifacts --workers 2
